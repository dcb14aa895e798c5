"""Checkpoints: any layout saves, any layout loads; no pickle, verified, published atomically."""
