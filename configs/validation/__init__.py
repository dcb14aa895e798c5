"""Checks across keys: pure functions without torch, each returns every problem that it finds."""
