"""Floor 2: volumes, records and pictures."""
