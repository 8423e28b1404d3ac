"""What is done with many runs: sweeps, comparisons, the report, and all of it in one command."""
