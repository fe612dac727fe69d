"""Floor 3: one candidate from volumes to record; knows neither Optuna nor Ray."""
