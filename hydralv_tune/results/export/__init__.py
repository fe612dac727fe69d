"""The best configuration in the forms that other tools read."""
