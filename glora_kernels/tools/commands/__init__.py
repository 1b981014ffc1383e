"""The commands of `python -m glora_kernels`, one module each."""
