"""Checkpoints, snapshots, and WHAT -> a trained model."""
