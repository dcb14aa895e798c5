"""Random jobs under random layouts, held against one process: `python -m tests.fuzz_layouts`."""
