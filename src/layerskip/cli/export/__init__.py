"""Commands that write a model, or what belongs to it, for other programs."""
