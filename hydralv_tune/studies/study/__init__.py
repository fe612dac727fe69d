"""The study: one Optuna study in a database, and the only package that imports Optuna.

Reading, from anywhere, without writing:

    study = open_readonly(storage, name)     # StudyError: absent, silent, unknown name
    study.facts()                            # the keys of `status --json`
    study.trials()                           # list[TrialView], see trial_view.py
    study.best()                             # TrialView | None
    study.table()                            # DataFrame of the finished trials
    study.space, study.out, study.folder_of(view)
    facts_of(storage, name)                  # open_readonly(...).facts()

Driving, from `launch.run_study` alone:

    study = Study.open(storage, name, space=space, create=True, extend=False)
    with Driver(study, out=folder) as driver:
        driver.ask(target)                   # Asked | "wait" | "done"
        driver.report(number, step, value)   # "go" | "prune" | "refused"
        driver.tell(number, Outcome(...))    # False: refused, or kept in the journal
        driver.poll()                        # journal, numbers that the database has taken away

Every change is made under the study mutex. The database is the only lasting truth: `reconcile`
may run any number of times, and relaunching is resuming.
"""

from hydralv_tune.studies.study.database import DatabaseAway
from hydralv_tune.studies.study.driver import GRACE_S, HEARTBEAT_S, Driver
from hydralv_tune.studies.study.search import make_pruner, make_sampler
from hydralv_tune.studies.study.study import (
    IDENTITY,
    OUT,
    Study,
    facts_of,
    find_study,
    open_all,
    open_readonly,
    study_names,
)

__all__ = [
    "GRACE_S",
    "HEARTBEAT_S",
    "IDENTITY",
    "OUT",
    "DatabaseAway",
    "Driver",
    "Study",
    "facts_of",
    "find_study",
    "make_pruner",
    "make_sampler",
    "open_all",
    "open_readonly",
    "study_names",
]
