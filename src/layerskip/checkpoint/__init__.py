"""Models on disk: found by name, read in Hugging Face's format or from GGUF files, and planned into a network."""
