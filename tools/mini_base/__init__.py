"""Builds sdlora's embedded default base ("mini base") from openly licensed icons.

Run ``python -m tools.mini_base --help`` from the repository root.
"""
