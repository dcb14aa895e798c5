"""From what was written, in files and on the command line, to values of the declared types."""
