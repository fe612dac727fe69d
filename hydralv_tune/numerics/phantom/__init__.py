"""A synthetic EM volume with known vesicles."""
