"""Floor 2: which path a call takes, with which blocks, and in which buffers."""
