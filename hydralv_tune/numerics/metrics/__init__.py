"""Scores of a segmentation against the ground truth."""
