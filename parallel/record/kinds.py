"""What the entries of a record are, beside the program's operations and the collectives, which have their own names.

An operation's entry spans what its handler does; what it waits for and what it communicates lies inside it. Outside the
program, the step's own thread writes what the trainer does between two steps.
"""

from __future__ import annotations

WAIT = "wait"
"""Of an operation, for data from a neighbour (no axis), or for what runs beside it: the job of a lane over an axis, or
of `COPIES`."""
COPIES = "copies"
"""The axis of waits for copies between this rank's device, host and disk."""
COPY = "copy"
"""Of a collective or transfer between processes of a host: what it copied out of another rank's memory, where that took
0.2 ms or more."""
MEMORY = "memory"
"""How many bytes are on the device after an operation, where somebody counts them."""
RECOMPUTE = "recompute"
"""A part of a forward pass that is made again, inside the backward operation that needs it."""
DATA = "data"
"""Waiting for the loader."""
SETTLE = "settle"
"""What is left of the optimizer's copies after the last operation."""
DRAIN = "drain"
"""Reading a step's numbers from the device."""
REPORT = "report"
"""Giving a step's numbers to the files, the console and the trackers."""
SAVE = "save"
"""What a checkpoint takes of the step's own thread: waiting for the one before, and copying, or all of it."""
WRITE = "write"
"""A checkpoint's way to the disk, beside the steps where checkpoints are asynchronous."""
SNAPSHOT = "snapshot"
"""Copying the state to where it outlives this process."""
EVALUATE = "evaluate"
"""A whole evaluation, its samples included, or a bad step that is run again to be looked at; the program's operations
inside it carry the step's number too."""
COLLECT = "gc"
"""A collection of Python's garbage that took a while."""
BARRIER = "barrier"
"""Meeting the other ranks outside the step."""
