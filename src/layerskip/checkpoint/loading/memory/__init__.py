"""What a model needs of a device's memory, known before it is loaded."""
