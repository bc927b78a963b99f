"""What a step is fed: where each image ends up, which one when, encoded once and kept."""
