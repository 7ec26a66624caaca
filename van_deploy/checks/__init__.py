"""Checks of artifacts against the original network."""
