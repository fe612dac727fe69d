"""Probabilities to instances: seeds, flood and the exact sums over every threshold."""
