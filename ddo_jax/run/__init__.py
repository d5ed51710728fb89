"""The harness: configs, state, steps, loops, rounds, checkpoints, records, report."""
