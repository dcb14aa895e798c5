"""A model's first values: drawn by global name, made of a dense model, padded."""
