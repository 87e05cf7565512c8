"""GGUF files, as llama.cpp has them: container, configuration, tensors, tokenizer."""
