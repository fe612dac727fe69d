"""Search training configurations and decoding thresholds for 3D vesicle segmentation."""

__version__ = "0.1.0"
