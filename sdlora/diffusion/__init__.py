"""Noise: adding it in training, and taking it away step by step in drawing; mathematics only."""
