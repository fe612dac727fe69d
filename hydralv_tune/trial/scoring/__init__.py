"""Prediction, threshold sweep and score of one trial."""
