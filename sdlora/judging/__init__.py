"""How near drawn images come to a style, and whether they copy."""
