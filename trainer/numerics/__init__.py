"""Guards of numbers: bits that changed by themselves are found before an update uses them, and said where."""
