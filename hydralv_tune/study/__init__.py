"""One Optuna study in a database; the only package that imports Optuna.

Reading, from anywhere, without writing:

    found = find.find_study("runs/hydra")            # StudyAddress: storage, name, folder
    study = open_readonly(found.storage, found.name)  # StudyError: absent, silent, not ours
    study.facts()                                     # what `status --json` prints
    study.trials(), study.best()                      # TrialView of trial_views
    study.table()                                     # DataFrame of the finished trials
    study.space, study.out, study.folder_of(view)

Driving, from `launch.run.run_study` alone:

    study = Study.open(storage, name, space=space, create=True)
    with Driver(study, out=folder) as driver:
        driver.ask(target)                            # Asked | "wait" | "done"
        driver.report(number, step, value)            # "go" | "prune" | "refused"
        driver.tell(number, TrialResult(...))         # "told" | "kept" | "refused"
        driver.poll()                                 # numbers that the database has taken away

Every change is made under the study mutex. The database is the only lasting state: `reconcile` may
run any number of times, and starting a study again continues it.
"""
