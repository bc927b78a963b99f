"""What is in an image folder: files, captions, masks, weights, near duplicates; Pillow only, no torch."""
