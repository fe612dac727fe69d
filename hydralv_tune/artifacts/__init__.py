"""What a trial leaves behind on disk: records, checkpoints, pictures."""
