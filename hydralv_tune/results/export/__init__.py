"""The best configuration in the forms that other tools read."""

MODEL_FORMATS = {"torchscript": ".pt", "bioimageio": ".zip"}
"""Each format of a model that runs without this package, and what its files end with."""
