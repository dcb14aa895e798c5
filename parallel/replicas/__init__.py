"""Data parallelism: gradients reduced, optimizer states and parameters spread over the replicas."""
