"""Floor 4: many trials; `study` alone imports Optuna, `launch` alone Ray."""
