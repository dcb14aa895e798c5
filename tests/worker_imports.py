"""What the worker processes of `run_distributed` have imported before they start: their fork server does it once."""

import gc

import torch
import torch.fx.experimental.symbolic_shapes  # torch does at the first backward pass that is given a gradient

import pentad.parallel.replicas.fsdp
import tests.same_training

__all__ = ["pentad", "tests", "torch"]

torch.set_num_threads(1)  # before any product: a forked process has none of its parent's threads
gc.collect()
gc.freeze()  # what was imported stays: no collection in a worker needs to look at it
