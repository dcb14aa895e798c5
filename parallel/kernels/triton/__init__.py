"""Kernels in Triton for GPUs, as operators of torch; their reference is what torch computes in fp64."""
