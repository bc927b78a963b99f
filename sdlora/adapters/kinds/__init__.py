"""The kinds of adapters, one file each, and the table of them all."""
