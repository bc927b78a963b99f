"""Captions written for the images of a folder by models, and tags changed in all of them; all undoable."""
