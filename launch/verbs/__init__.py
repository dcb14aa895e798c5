"""The commands of `pentad`, a file each."""
