"""Self-speculative decoding for `transformers` models; `layerskip export transformers` copies these modules.

They import torch, transformers and each other, and nothing else: where they run, this package need not be installed.
`generate.py` is the entry that `model.generate(custom_generate=FOLDER)` calls.
"""
