"""A CUDA device that computes nothing and sees everything, for a machine that has no card.

On a CPU build of torch on Linux the whole program runs on "cuda": tensors there have shapes and formats but
no numbers, and all that a card would have been asked to do is counted by the line that asked. See README.md.
"""
