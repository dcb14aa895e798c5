"""What can be chosen by name: one table for each such key, a row a name. No torch."""
