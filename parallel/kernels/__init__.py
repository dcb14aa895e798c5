"""Attention and grouped matrix products on one device: one interface each, and who computes it fastest."""
