"""Where version 0.1.0 had `run_study`; scripts that import it from here still work.

New code takes `hydralv_tune.run_study`, or `hydralv_tune.launch.run` for this very function.
"""

from hydralv_tune.launch import cluster
from hydralv_tune.launch.coordinator import Event, StudyFailed
from hydralv_tune.launch.run import StudyInterrupted, run_study

__all__ = ["Event", "StudyFailed", "StudyInterrupted", "cluster", "run_study"]
