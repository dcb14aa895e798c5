"""A training step as a GPU would get it, told without one: meta tensors that say they are on CUDA."""
