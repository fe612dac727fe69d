"""One Optuna study in a database; the only package that imports Optuna."""
