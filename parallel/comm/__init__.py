"""The mesh and its collectives, over NCCL, gloo or the memory of one host; what waits can be ended."""
