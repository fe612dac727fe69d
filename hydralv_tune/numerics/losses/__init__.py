"""Losses of one task, of several, and how they are balanced."""
