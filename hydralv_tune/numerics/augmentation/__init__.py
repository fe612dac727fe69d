"""Augmentation of a batch of patches on its device."""
