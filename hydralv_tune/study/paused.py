"""Trials that the pruner stopped are paused: which of them goes on, and when."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hydralv_tune.study.earlier import ranks_of
from hydralv_tune.study.trial_views import RESUMABLE, TrialView, latest_ended


def trial_to_revive(trials: Sequence[TrialView], share: float) -> TrialView | None:
    """Return the paused trial that is to go on before a new candidate is tried, or None.

    Every new trial that is worse moves the paused ones up, and so does one that was paused later.

    Args:
        trials: Of the study.
        share: Of all ended trials, compared at equal evaluations, among which it must be; 1 for
            the best paused one at any rank.
    """
    ended = latest_ended(trials)
    paused = [i for i, trial in enumerate(ended) if trial.user_attrs.get(RESUMABLE)]
    if not paused:
        return None
    ranks = ranks_of(ended)
    best = min(paused, key=lambda i: (ranks[i], -len(ended[i].intermediate), ended[i].number))
    ahead = int(np.sum(ranks < ranks[best]))
    return ended[best] if ahead < share * len(ended) else None
