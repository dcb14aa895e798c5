"""The devices of this machine, and which kernels a model gets on them."""
