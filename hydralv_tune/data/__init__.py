"""What comes in from disk: volumes, their formats and what is wrong with them."""
