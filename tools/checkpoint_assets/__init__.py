"""Builds what single-file checkpoints leave out: the CLIP tokenizer's files."""
