"""Drawing: a loaded model with adapters at any strength, images and grids with their settings inside."""
