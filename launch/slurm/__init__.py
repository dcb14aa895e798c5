"""Jobs of SLURM: a batch script from a config, and what is asked of the queue about it."""
