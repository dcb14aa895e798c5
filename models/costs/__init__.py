"""Parameters and FLOPs of a model in closed form."""
