"""Base models: what each family is, and from whatever users give to a loaded one."""
