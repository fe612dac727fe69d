"""The score of every combination of decoding thresholds."""
