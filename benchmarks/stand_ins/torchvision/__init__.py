"""What diffusers' training scripts use of torchvision, for machines where no torchvision can be had.

Only ``torchvision.transforms`` for Pillow images. ``benchmarks/trainers.py`` puts this folder on the
peer's path when, and only when, the real package is missing. No ``__version__``: it is nobody's release.
"""
