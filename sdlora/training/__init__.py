"""A run: everything made ready before the first step, the loop, and what is kept of it."""
