"""What `generate` takes where a call names nothing; `layerskip export transformers` writes the model's own values."""

EXIT_LAYER: int | None = None
"""Layers that draft; None: a third of the model's."""
NUM_SPECULATIONS: int = 4
"""Tokens drafted in one round."""
