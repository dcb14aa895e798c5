"""The labels of tokens. No torch."""

IGNORED = -1
"""Label of a token without a loss."""
