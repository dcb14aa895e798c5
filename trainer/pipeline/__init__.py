"""The job's pipeline: who holds which layers, what a step is, and the passes that need the trainer."""
