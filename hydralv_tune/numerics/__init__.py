"""Floor 0: arrays and tensors in and out; no files, no config, no study."""
