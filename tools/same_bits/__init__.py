"""Proves that a restructuring changed nothing: the bits of seeded runs, before and after.

Everything goes through the command line (``python -m sdlora ...``) of the checkout that is looked at, never
through its modules, as those are what a restructuring moves.
"""
