"""Data: sources, balanced labels, the pool of fakes, the host pipeline."""
