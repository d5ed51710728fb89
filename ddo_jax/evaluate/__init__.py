"""Evaluation: feature networks, statistics, generate-and-score, the record of each number."""
