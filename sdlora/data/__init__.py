"""Pictures and captions: found, checked, sized, and put in an order. Pillow only, no torch."""
