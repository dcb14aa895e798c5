"""A job that goes on after a fault: other processes in the lost ones' places, and the state of the newest step."""
