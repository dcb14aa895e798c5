"""What a rank needs of its device's memory, and what would make a job fit."""
