"""The columns of a router's tally. No torch here."""

FIELDS = ("tokens", "assignments", "dropped", "null", "entropy", "top1", "aux", "z")
"""The first columns of a router's tally, sums over the step's tokens:

tokens that it saw; assignments of a token to an expert, before any is dropped; those of them that are dropped;
assignments to null experts; entropy (nats) of a token's scores, scaled to sum to 1; the largest of these; then the
balancing loss (0 where it has no coefficient) and the z-loss, without their coefficients, means over microbatches.
After them stands one column per choice, experts first and then null experts: how often it was chosen.
"""
