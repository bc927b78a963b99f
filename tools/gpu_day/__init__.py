"""The day a card comes: everything that only an NVIDIA card can show, by one command, in one report."""
