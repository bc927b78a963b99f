"""Adapter files for other programs, proven, with what lies beside them."""
