"""The training of one trial."""
