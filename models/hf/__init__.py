"""Hugging Face folders: configurations and tensors by the names of transformers, in and out."""
