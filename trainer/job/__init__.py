"""A whole job on one rank: arriving, resuming, training, reporting, leaving, and going on after a fault."""
