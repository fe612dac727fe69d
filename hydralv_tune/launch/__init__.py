"""Run a study on Ray; the only package that imports Ray.

    facts = run_study(space, volumes, study="hydra", storage="sqlite:///runs/hydra/study.db",
                      out=Path("runs/hydra"), trials=60, gpus_per_trial=1.0,
                      on_event=lambda event: print(event.kind, event.number, event.fields))

starts the study, or continues the one of that name, until `trials` are COMPLETE or PRUNED in all,
or a budget of the space ends it, and returns what `status --json` prints. Ctrl-C and SIGTERM let
the workers save and raise `StudyInterrupted`, which carries the same facts; the same call goes on.

Events (`coordinator.Event`: kind, number, fields) are `trial_started`, `evaluation`,
`trial_finished`, `trial_pruned`, `trial_failed`, `retry`, `waiting` and `stopped`.

Two adapters stand between one coordinator and Ray Tune: `StudySearcher` asks the study for trials,
and `StudyScheduler` hands it every result and stops what it prunes. Ray keeps no state that
matters: `Tuner.restore` is never used, and the database decides.
"""

import os

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints on stdout whatever the verbosity
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # volumes and folders keep their relative meaning
    "RAY_TQDM_PATCH_PRINT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "15",  # a trial that was pruned may still write its record
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # a worker that does not end by itself is killed
    "TUNE_GLOBAL_CHECKPOINT_S": "600",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "3600",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
