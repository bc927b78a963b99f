"""What was drawn: the gallery, and the strips, grids and comparisons that the page shows."""

from .listing import list_images
from .shapes import compare_html, grid_html, image_html, strip_html

__all__ = ["compare_html", "grid_html", "image_html", "list_images", "strip_html"]
