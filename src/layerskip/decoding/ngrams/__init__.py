"""Drafts that cost no layers: what followed the last tokens of a text before, in it or in texts of other requests."""
