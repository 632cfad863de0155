"""Experts on disk: where their bytes are, which of them are in memory, and what brings them there."""
