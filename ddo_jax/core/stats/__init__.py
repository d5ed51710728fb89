"""Statistics of images and features: pure, but not DDO."""
