"""Text from a model: one piece after the other, the next token."""
