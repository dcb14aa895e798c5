"""Optimizers over flat units, and the learning rate over the steps."""
