"""What is wrong or odd with an image folder, shown, and repaired in a copy; no torch."""
