"""Base models: what each family is, and how a base is recognised and loaded."""
