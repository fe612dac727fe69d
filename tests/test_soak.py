"""500 trials on PostgreSQL, of which many crash, diverge or hang, and two drivers are killed."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from hydralv_tune.study.study import open_readonly

TRIALS = 500


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_counts_add_up_to_the_last_one(fake_study: Any, postgres: Any) -> None:
    storage = postgres.new_database()
    config = {
        "storage": storage,
        "trials": TRIALS,
        "steps": 2,
        "step_s": 0.0,
        "rates": {"crash": 0.05, "nan": 0.05, "hang": 0.05},
        "space": {"budget": {"trial_timeout_s": 8}, "sampler": {"name": "random"}},
        "options": {"heartbeat_s": 5.0, "grace_s": 30.0},
    }
    study = None
    for goal in (TRIALS // 3, 2 * TRIALS // 3):
        driver = fake_study.start(**config)
        fake_study.until(lambda rows: bool(rows), timeout_s=120)
        study = study or open_readonly(storage, "fake")
        deadline = time.monotonic() + 900
        while sum(study.facts()["trials"][k] for k in ("complete", "pruned")) < goal:
            assert time.monotonic() < deadline
            assert driver.poll() is None, fake_study.errors()
            time.sleep(1.0)
        driver.kill()
        driver.wait(30)
    facts = fake_study.run(timeout_s=1200, **config)
    counts = facts["trials"]
    trials = study.trials()
    assert counts["complete"] + counts["pruned"] == TRIALS
    assert counts["running"] == 0
    assert counts["waiting"] == 0
    assert sum(counts.values()) == len(trials)
    kinds = Counter(kind(t.user_attrs["reason"]) for t in trials if t.state == "FAIL")
    assert sum(kinds.values()) == counts["fail"]
    assert set(kinds) == {"crash", "nan", "hang", "orphan"}, kinds
    # Every crash and every orphan has exactly one successor; nothing else has one. Where the driver
    # died while it drew new parameters there was nothing yet to try again.
    followed = Counter(t.user_attrs["retry_of"] for t in trials if "retry_of" in t.user_attrs)
    assert set(followed.values()) == {1}
    for trial in trials:
        if trial.state == "FAIL":
            asked = "owner" in trial.user_attrs or bool(trial.requested)
            again = asked and kind(trial.user_attrs["reason"]) in ("crash", "orphan")
            assert (trial.number in followed) == (again and trial.attempt <= 2), trial.number
    finished = [t for t in trials if t.state in ("COMPLETE", "PRUNED")]
    assert len({t.root for t in finished}) == TRIALS
    assert len({tuple(sorted(t.params.items())) for t in finished}) == TRIALS


def kind(reason: str) -> str:
    """Return the kind of a failure from its reason."""
    words = {"process died": "crash", "nan": "nan", "timeout": "hang", "orphaned": "orphan"}
    return next((name for word, name in words.items() if word in reason), reason)
