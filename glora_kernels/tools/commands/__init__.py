"""Floor 6: the commands of `python -m glora_kernels`, one module each."""
