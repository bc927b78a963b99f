"""The settings of a run: what exists, what is allowed, how they are read, and what follows the data."""
