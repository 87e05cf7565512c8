"""From the options of loading to a plan that fits the checkpoint and the machine."""
