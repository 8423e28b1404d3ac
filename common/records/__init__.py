"""What a run leaves: its files, their schemas, and its checkpoints."""
