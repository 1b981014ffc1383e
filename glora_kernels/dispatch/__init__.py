"""What the operators share of PyTorch: a call prepared, the ways into it, registration."""
