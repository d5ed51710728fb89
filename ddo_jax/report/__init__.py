"""What a finished run shows: tables, curves, grids."""
