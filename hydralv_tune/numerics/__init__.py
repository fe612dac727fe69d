"""Arrays and tensors in and out; no files, no configuration, no study."""
