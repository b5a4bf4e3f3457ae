"""A run while it runs: what it does, and whether something is wrong with it."""
