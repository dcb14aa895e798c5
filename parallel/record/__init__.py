"""The record: what every rank really did, in a ring that outlives its process, and its readers."""
