"""Checkpoints that all ranks see, and those that each node keeps for itself."""
