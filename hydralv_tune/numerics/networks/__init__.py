"""Networks by name, and how each is built."""
