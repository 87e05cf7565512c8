"""From a checkpoint's tensors to a network: which there must be, and how they are read, packed and put together."""
