"""Checkpoints made of checkpoints."""
