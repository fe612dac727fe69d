"""File formats of volumes, one file each."""
