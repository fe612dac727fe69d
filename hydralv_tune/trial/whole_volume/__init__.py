"""Segmentation of a volume of any size in bounded memory: prediction and decoding in parts."""
