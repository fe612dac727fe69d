"""One candidate from volumes to record; knows neither Optuna nor Ray."""
