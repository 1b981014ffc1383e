"""A weight in 4 bits: dequantized, and multiplied by few tokens."""
