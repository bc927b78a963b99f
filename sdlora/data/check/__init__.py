"""What is wrong or odd with an image folder, shown and mended in a copy; no torch."""
