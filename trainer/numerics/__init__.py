"""Guards of numbers: bits that changed by themselves, and numbers that are not finite, are found and said where."""
