"""Several LoRA layers that read one input as one operator."""
