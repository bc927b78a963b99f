"""The style benchmark: how well an adapter learned a style, for our trainer and for others alike."""
