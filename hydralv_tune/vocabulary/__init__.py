"""Floor 1: what candidates and search spaces may say; frozen values, unknown keys refused."""
