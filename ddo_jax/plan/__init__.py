"""What `--dry_run` prints."""
