"""PEFT's own layers on our operators: the layers with another forward, and the switch between the two."""
