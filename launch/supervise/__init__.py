"""Starting the ranks of this machine, passing signals on, telling the cause of a failure."""
