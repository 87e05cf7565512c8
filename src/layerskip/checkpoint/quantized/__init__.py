"""Checkpoints whose weights are whole numbers with scales: the published layouts, read and written."""
