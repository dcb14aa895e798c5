"""Several nodes: what their watchers tell each other, who of them decides, and where the ranks meet."""
