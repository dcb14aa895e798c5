"""A rank among the processes of its job: who started it, how it stops, how it tells why it failed."""
