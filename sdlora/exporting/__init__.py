"""Adapter files for other programs, proven, with the files that belong beside them."""
