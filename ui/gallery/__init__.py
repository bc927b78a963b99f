"""What was drawn: the gallery, and the strips, grids and comparisons that the page shows."""

from .listing import list_pictures
from .shapes import compare_html, grid_html, picture_html, strip_html

__all__ = ["compare_html", "grid_html", "list_pictures", "picture_html", "strip_html"]
