"""Does the search search? Replay tabulated learning curves on a fake clock, many times over.

`python benchmarks/search.py [--seeds 40] [--keep FILE] [--minutes M] [--plot FILE]` compares the
defaults, cold and taught by earlier studies, with what one would do without them: random search
without pruning, TPE without pruning, and tuning the decoding thresholds of the baseline alone,
which is what PyTorch Connectomics offers. The curves in `search_table/` were made by really
training every candidate of a small space on several volumes (`search_table/train_curves.py`); a
GPU-second here is a second of one CPU core there, and a rate between two tabulated ones has a curve
between theirs. Proposals, pauses, warm starts and the guard are those of a real study; only the
training, the clock and the database (in memory) are not.

`--keep` makes it go on where it was stopped; `--minutes` stops it. With `--to-goal` a study ends
once it has reached what random search ends with, which takes a third of the time and leaves out the
column of best errors. `--variants` compares other samplers and pruners too: the defaults were
chosen from that table. `--write-shelf` writes the table of ranks that ships with the package.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import multiprocessing
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd

import hydralv_tune.study
from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.search_space import Pruner, Sampler, SearchSpace
from hydralv_tune.config.search_space_files import load_space
from hydralv_tune.numerics.cores import usable_cores
from hydralv_tune.study.distributions import suggest
from hydralv_tune.study.earlier import (
    GUIDED_SAMPLER,
    WAITED_FOR,
    Guide,
    Lesson,
    lesson_of,
    pruner_with,
)
from hydralv_tune.study.paused import trial_to_revive
from hydralv_tune.study.proposals import ProposalSampler, TriedCandidates
from hydralv_tune.study.pruners import make_pruner
from hydralv_tune.study.samplers import make_sampler
from hydralv_tune.study.study import view_of
from hydralv_tune.study.trial_views import RESUMABLE, VIOLATIONS, TrialView

GUARD = "f1_iou50"
FOLDER = Path(__file__).parent / "search_table"
LR = "optimization.optimizer.lr"
WORKERS = 4
"""GPUs of the simulated study, as in the plan's night."""

TRIALS = 60
"""Full trainings in the budget that every strategy gets, as in `hydra_lv`."""

SHELF = Path(hydralv_tune.study.__file__).parent / "shelf.json"
SHELF_VERSION = 2
SHOWN = {"hydra": "half of hydra-11-5", "mito": "half of vnc-mito"}
"""What a real volume is called; the others are phantoms."""

EARLIER_TRIALS = 36
"""Finished trials of an earlier study that another one learns from."""


@dataclass(frozen=True)
class Curve:
    """A training as it went.

    Args:
        seconds: Of the trial at the end of each evaluation.
        values: Adapted Rand error of the best checkpoint so far.
        f1: F1 at IoU 0.5 of that checkpoint.
        fails_after: Seconds after which it failed, None where it ended well.
    """

    seconds: tuple[float, ...]
    values: tuple[float, ...]
    f1: tuple[float, ...]
    fails_after: float | None


@dataclass(frozen=True)
class Strategy:
    """A way to search: how trials are chosen and which are ended early."""

    name: str
    sampler: Sampler = field(default_factory=Sampler)
    pruner: Pruner = field(default_factory=Pruner)
    warm_starts: bool = True
    guard_first: bool = True
    repeats: bool = False
    guided: bool = True
    lessons: Callable[[str, int], Sequence[Lesson]] | None = None


@dataclass(frozen=True)
class Progress:
    """The best `guarded` error as GPU-seconds went by; infinite before the first trial.

    Args:
        seconds: GPU-seconds spent when the best error changed, ascending.
        best: From then on.
        finished: Trials that ended COMPLETE.
        pruned: Trials that ended PRUNED.
        goal: Best error at which the study was ended, 0 where its budget was spent.
    """

    seconds: tuple[float, ...]
    best: tuple[float, ...]
    finished: int = 0
    pruned: int = 0
    goal: float = 0.0

    def at(self, seconds: float) -> float:
        """Return the best error after so many GPU-seconds."""
        index = int(np.searchsorted(self.seconds, seconds, side="right")) - 1
        return self.best[index] if index >= 0 else math.inf

    def time_to(self, error: float) -> float:
        """Return the GPU-seconds after which the error was reached, infinite where it was not."""
        return next(
            (spent for spent, best in zip(self.seconds, self.best, strict=True) if best <= error),
            math.inf,
        )


@cache
def space() -> SearchSpace:
    """Return the space that was tabulated."""
    return load_space(FOLDER / "space.yaml")


@cache
def curves(volume: str) -> dict[tuple[Any, ...], Curve]:
    """Return the curve of each candidate on a volume, by its parameters."""
    table = _trained()
    table = table[table["phantom"] == volume]
    found = {}
    for key, rows in table.groupby(list(space().parameters), sort=False):
        ok = rows[rows["evaluation"] > 0].sort_values("evaluation")
        failed = rows[rows["evaluation"] == 0]["seconds"]
        found[key] = Curve(
            tuple(ok["seconds"]), tuple(ok["value"]), tuple(ok["f1"]),
            float(failed.iloc[0]) if len(failed) else None,
        )  # fmt: skip
    return found


@cache
def volumes() -> tuple[str, ...]:
    """Return the names of the volumes of which the table holds every candidate."""
    choices = {key: len(one.choices) for key, one in space().parameters.items() if key != LR}
    found = []
    for name, rows in _trained().groupby("phantom"):
        keys = rows[list(space().parameters)].drop_duplicates()
        levels = keys.nunique()
        chosen = (levels[list(choices)] == list(choices.values())).all()
        if chosen and levels[LR] > 1 and len(keys) == levels.prod():
            found.append(str(name))
    return tuple(sorted(found))


@cache
def _trained() -> pd.DataFrame:
    """Return a row per evaluation of every training."""
    return pd.read_csv(FOLDER / "curves.csv.gz")


@cache
def full_budget(volume: str) -> float:
    """Return the GPU-seconds that `TRIALS` full trainings take on average."""
    ends = [curve.fails_after or curve.seconds[-1] for curve in curves(volume).values()]
    return TRIALS * statistics.fmean(ends)


def curve_of(volume: str, params: Mapping[str, Any]) -> Curve:
    """Return the curve of a candidate: between those of the two tabulated rates around its own.

    Where one of the two failed, or has other evaluations, it is the curve of the nearer.
    """
    table = curves(volume)
    at = list(space().parameters).index(LR)
    rates = sorted({key[at] for key in table})
    place = float(np.interp(math.log(params[LR]), np.log(rates), np.arange(len(rates))))
    below = min(int(place), len(rates) - 2)
    pair = [
        table[tuple({**params, LR: rates[i]}[key] for key in space().parameters)]
        for i in (below, below + 1)
    ]
    weight = place - below
    near = pair[round(weight)]
    alike = len(pair[0].values) == len(pair[1].values)
    if weight in (0, 1) or not alike or any(curve.fails_after for curve in pair):
        return near
    mixed = [
        tuple((1 - weight) * a + weight * b for a, b in zip(one, other, strict=True))
        for one, other in (
            (pair[0].seconds, pair[1].seconds),
            (pair[0].values, pair[1].values),
            (pair[0].f1, pair[1].f1),
        )
    ]
    return Curve(*mixed, fails_after=None)


def guarded(error: float, f1: float) -> float:
    """Return an error, or 1 and what the F1 is below the guard: that is worse than any error."""
    below = space().objective.guard.f1_iou50 - f1
    return 1 + below if below > 0 else error


def simulate(strategy: Strategy, volume: str, seed: int, goal: float = 0.0) -> Progress:
    """Return how a study goes until its GPU-seconds are spent or its best error is at a goal."""
    return _simulated(strategy, volume, seed, goal=goal)[0]


@cache
def table_lesson(volume: str) -> Lesson:
    """Return what all tabulated candidates teach of a volume; those that failed come last."""
    found, guard = curves(volume), space().objective.guard.f1_iou50
    ends = {
        key: (2.0, 0.0) if curve.fails_after else (max(guard - curve.f1[-1], 0), curve.values[-1])
        for key, curve in found.items()
    }
    order = sorted(ends, key=lambda key: ends[key])
    ranks = {key: round(index / (len(order) - 1), 4) for index, key in enumerate(order)}
    keys = tuple(space().parameters)
    return Lesson(
        volume, keys,
        tuple(dict(zip(keys, key, strict=True)) for key in found),
        tuple(ranks[key] for key in found),
    )  # fmt: skip


def shelf_without(volume: str, seed: int) -> list[Lesson]:
    """Return the shelf as it would be had the volume never been seen."""
    return [table_lesson(name) for name in volumes() if name != volume]


def shelf_text() -> str:
    """Return the file that ships with the package: the rank of each candidate on each volume.

    None stands where a candidate was not trained on a volume.
    """
    lessons = {name: table_lesson(name) for name in volumes()}
    params = [each for lesson in lessons.values() for each in lesson.params]
    rows = list(dict.fromkeys(tuple(each.values()) for each in params))
    ranks = {}
    for name, lesson in lessons.items():
        own = {tuple(each.values()): rank
               for each, rank in zip(lesson.params, lesson.ranks, strict=True)}  # fmt: skip
        ranks[SHOWN.get(name, f"phantom {name}")] = [own.get(row) for row in rows]
    parts = [f'"version": {SHELF_VERSION}', f'"keys": {json.dumps(list(space().parameters))}']
    parts.append('"candidates": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]")
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in ranks.items()]
    parts.append('"ranks": {\n  ' + ",\n  ".join(lines) + "\n }")
    return "{" + ",\n ".join(parts) + "}\n"


@cache
def earlier_lesson(volume: str, seed: int) -> Lesson:
    """Return what a study of `EARLIER_TRIALS` trials on a volume teaches, made by the tool."""
    trials = _simulated(COLD, volume, seed, EARLIER_TRIALS)[1]
    lesson = lesson_of(space(), trials, f"{volume}#{seed}")
    assert lesson is not None
    return lesson


def _simulated(
    strategy: Strategy,
    volume: str,
    seed: int,
    trials_wanted: int | None = None,
    goal: float = 0.0,
) -> tuple[Progress, list[TrialView]]:
    """Return how a study goes until its GPU-seconds are spent or so many trials finished."""
    sampler = strategy.sampler.model_copy(update={"seed": seed})
    lessons = [] if strategy.lessons is None else strategy.lessons(volume, seed)
    study = optuna.create_study(pruner=make_pruner(pruner_with(lessons, strategy.pruner)))
    tried = TriedCandidates(space(), sampler.min_distance)
    alone = sampler.name == GUIDED_SAMPLER and strategy.guided
    guide = Guide(space(), lessons, alone) if lessons or alone else None
    recipes = [dict(space().warm_start(name).params) for name in space().warm_starts]
    if not strategy.warm_starts:
        recipes = []
    lasting = make_sampler(sampler, 0) if sampler.name in ("cmaes", "qmc") else None
    budget = full_budget(volume) / WORKERS  # on the clock: all workers are always busy
    events: list[tuple[float, int, int, float]] = []
    live: dict[int, tuple[optuna.Trial, Curve]] = {}
    violations: dict[int, dict[str, float]] = defaultdict(dict)
    revived: set[int] = set()
    seconds, best = [0.0], [math.inf]
    states = {"COMPLETE": 0, "PRUNED": 0}

    def start(now: float) -> None:
        trials = [view_of(trial) for trial in study.get_trials(deepcopy=False)]
        chosen = lasting or make_sampler(sampler, len(trials))
        if strategy.repeats:
            study.sampler = chosen
        else:
            tried.update(trials)
            study.sampler = ProposalSampler(
                chosen, tried, seed * 1_000_003 + len(trials), trials, guide
            )
        paused = None
        may_wait = len(lessons) >= WAITED_FOR
        if not recipes or may_wait:
            paused = trial_to_revive(trials, strategy.pruner.revive)
        if paused is not None:
            study.enqueue_trial(dict(paused.params), user_attrs={"retry_of": paused.number})
            states["PRUNED"] -= 1
        elif recipes:
            chosen_first = None
            if guide is not None and may_wait:
                generator = random.Random(seed * 1_000_003 + len(trials))
                chosen_first = guide.propose(trials, tried, generator, waiting=recipes)
            if chosen_first is None:
                chosen_first = recipes[0]
            recipes[:] = [each for each in recipes if each is not chosen_first]
            study.enqueue_trial(dict(chosen_first))
        trial = study.ask()
        curve = curve_of(volume, suggest(space(), trial))
        trial.set_user_attr("owner", "simulated")
        live[trial.number] = (trial, curve)
        done = 0 if paused is None else len(paused.intermediate)
        if paused is not None:
            violations[trial.number] = dict(violations[paused.number])
            for step, value in paused.intermediate.items():
                trial.report(value, step)
            revived.add(trial.number)
        began = now - (curve.seconds[done - 1] if done else 0.0)
        follows = [*curve.seconds, curve.fails_after][done]
        assert follows is not None
        heapq.heappush(events, (began + follows, trial.number, done, began))

    for _ in range(WORKERS):
        start(0.0)
    while events and events[0][0] <= budget:
        now, number, index, began = heapq.heappop(events)
        trial, curve = live[number]
        if index >= len(curve.seconds):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            start(now)
            continue
        value, f1 = curve.values[index], curve.f1[index]
        trial.report(value, index + 1)
        if strategy.guard_first:
            violations[number] |= {str(index + 1): space().objective.guard.f1_iou50 - f1}
            trial.set_user_attr(VIOLATIONS, violations[number])
        last = index + 1 == len(curve.seconds) and curve.fails_after is None
        pruned = not last and number not in revived and trial.should_prune()
        if not last and not pruned:
            follows = [*curve.seconds, curve.fails_after][index + 1]
            assert follows is not None
            heapq.heappush(events, (began + follows, number, index + 1, began))
            continue
        trial.set_constraint(GUARD, space().objective.guard.f1_iou50 - f1)
        state = optuna.trial.TrialState.COMPLETE if last else optuna.trial.TrialState.PRUNED
        trial.set_user_attr(RESUMABLE, not last)
        study.tell(trial, value if last else None, state=state)
        states[state.name] += 1
        if last and (shown := guarded(value, f1)) < best[-1]:
            seconds.append(now * WORKERS)
            best.append(shown)
        if states["COMPLETE"] + states["PRUNED"] == trials_wanted or best[-1] <= goal:
            break
        start(now)
    views = [view_of(trial) for trial in study.get_trials(deepcopy=False)]
    ended = states["COMPLETE"], states["PRUNED"]
    return Progress(tuple(seconds), tuple(best), *ended, goal), views


@cache
def _thresholds(
    volume: str,
) -> tuple[dict[str, list[float]], dict[tuple[float, ...], dict[str, float]], float]:
    """Return the values of each axis, the figures of each combination, and seconds for one."""
    table = pd.read_csv(FOLDER / "thresholds.csv.gz")
    table = table[table["phantom"] == volume]
    figures = ["adapted_rand_error", "f1_iou50"]
    axes = [name for name in table.columns if name not in (*figures, "phantom", "seconds")]
    levels = {name: sorted(table[name].unique()) for name in axes}
    rows = table.set_index(axes)[figures].to_dict("index")
    return levels, rows, float(table["seconds"].iloc[0])


def thresholds_only(volume: str, seed: int) -> Progress:
    """Return how tuning the thresholds of the baseline goes: one training, then one combination
    decoded and scored at a time, chosen by TPE.
    """
    levels, rows, cost = _thresholds(volume)
    trained = curve_of(volume, space().warm_start("baseline").params)
    spent = trained.seconds[-1]
    study = optuna.create_study(
        sampler=make_sampler(Sampler(seed=seed), 0)  # one sampler: it draws a sequence
    )
    guard = space().objective.guard.f1_iou50
    seconds, best = [0.0], [math.inf]
    for _ in range(THRESHOLD_TRIALS):
        trial = study.ask()
        chosen = tuple(
            values[trial.suggest_int(name, 0, len(values) - 1)] for name, values in levels.items()
        )
        row = rows[chosen]
        spent += cost
        error, f1 = float(row["adapted_rand_error"]), float(row["f1_iou50"])
        trial.set_constraint(GUARD, guard - f1)
        study.tell(trial, error)
        if (shown := guarded(error, f1)) < best[-1]:
            seconds.append(spent)
            best.append(shown)
    return Progress(tuple(seconds), tuple(best), 1)


THRESHOLD_TRIALS = 200
"""Combinations tried; more bring nothing, since the exact sweep's best is soon reached."""

THRESHOLDS = "thresholds of the baseline only"
NO_PRUNING = Pruner(name="none")
RANDOM = Strategy(
    "random, repeats", Sampler(name="random"), NO_PRUNING, warm_starts=False, repeats=True
)
RANDOM_ONCE = Strategy("random, no repeats", Sampler(name="random"), NO_PRUNING, warm_starts=False)


def one_earlier(volume: str, seed: int) -> list[Lesson]:
    """Return what a study on another volume teaches, made by the tool itself."""
    others = [name for name in volumes() if name != volume]
    return [earlier_lesson(others[seed % len(others)], 1000 + seed)]


def two_earlier(volume: str, seed: int) -> list[Lesson]:
    """Return what a study on each of two other volumes teaches."""
    others = [name for name in volumes() if name != volume]
    return [earlier_lesson(name, 1000 + seed) for name in others[:2]]


def misleading(volume: str, seed: int) -> list[Lesson]:
    """Return what a study on another volume would teach were its ranks reversed."""
    (lesson,) = one_earlier(volume, seed)
    return [replace(lesson, ranks=tuple(1 - rank for rank in lesson.ranks))]


COLD = Strategy("cold: the defaults without the shelf")
BARE = Strategy("cold, without warm starts", warm_starts=False)
ONE = Strategy("after one earlier study", lessons=one_earlier)
TWO = Strategy("after two earlier studies", lessons=two_earlier)
SHELVED = Strategy("with the shelf, but for this volume", lessons=shelf_without)
MISLED = Strategy("after one misleading study", lessons=misleading)
MAIN = (
    RANDOM,
    RANDOM_ONCE,
    Strategy(
        "TPE, no pruning", Sampler(), NO_PRUNING, warm_starts=False, repeats=True, guided=False
    ),
    COLD,
    BARE,
    ONE,
    TWO,
    SHELVED,
    MISLED,
)
"""Random search first: what it ends with is what the others are asked for."""

TARGETS = ((COLD, 0.20, 0.45, 0.03), (TWO, 0.125, 0.30, 0.0), (SHELVED, 0.125, 0.30, 0.0))
"""Share of random search's time wanted at the median and upper quartile, and how many never."""


def variants() -> list[Strategy]:
    """Return other pruners under the default sampler, and other samplers under its pruner."""
    cold = {"warm_starts": False, "guided": False}
    pruners = [
        Pruner(warmup_evaluations=warmup, patience=patience)
        for warmup in (1, 2, 3, 4)
        for patience in (0, 1, 2)
        if (warmup, patience) != (Pruner().warmup_evaluations, Pruner().patience)
    ]
    pruners += [
        Pruner(name="percentile", percentile=share, warmup_evaluations=warmup)
        for share, warmup in ((25.0, 2), (25.0, 3), (35.0, 3))
    ]
    pruners += [
        Pruner(name="hyperband", warmup_evaluations=1),
        Pruner(name="successive_halving", warmup_evaluations=2),
    ]
    found = []
    for pruner in pruners:
        detail = f"{pruner.percentile:g} % kept, " if pruner.name == "percentile" else ""
        detail += f"warm-up {pruner.warmup_evaluations}, patience {pruner.patience}"
        found.append(Strategy(f"TPE, {pruner.name} ({detail})", pruner=pruner, **cold))
    found.append(Strategy("TPE, default pruner blind to the guard", guard_first=False, **cold))
    found.append(Strategy("random, default pruner", Sampler(name="random"), **cold))
    found += [
        Strategy(f"TPE, {count} start-up trials", Sampler(startup_trials=count), **cold)
        for count in (3, 10, 20)
    ]
    return found


def _run(task: tuple[Strategy | None, str, int, float]) -> Progress:
    """Simulate one study until a goal; None is tuning thresholds alone."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    strategy, volume, seed, goal = task
    if strategy is None:
        return thresholds_only(volume, seed)
    return simulate(strategy, volume, seed, goal)


Runs = dict[str, dict[str, list[Progress]]]


def run_all(
    strategies: Sequence[Strategy | None],
    seeds: int,
    processes: int,
    keep: Path | None,
    end: float,
    goals: Mapping[str, float] | None = None,
) -> Iterator[tuple[str, dict[str, list[Progress]]]]:
    """Yield name and progress of each strategy on every volume under every seed.

    Args:
        strategies: None is tuning thresholds alone.
        seeds: Studies of each on each volume.
        processes: That run side by side.
        keep: File of what was run before, which is not run again; it takes what is new.
        end: Monotonic time after which nothing new is begun; what is missing then is left out.
        goals: Best error on each volume at which a study ends; without, its budget is spent.
    """
    known: dict[str, dict[str, Any]] = {}
    goals = goals or dict.fromkeys(volumes(), 0.0)
    if keep is not None and keep.exists():
        known = json.loads(keep.read_text())
    named = {THRESHOLDS if each is None else each.name: each for each in strategies}
    tasks = [
        (name, volume, seed)
        for seed in range(seeds)  # so that a run that is stopped has as many of each
        for name in named
        for volume in volumes()
        if not _serves(known.get("/".join((name, volume, str(seed)))), goals[volume])
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        given = ((named[name], volume, seed, goals[volume]) for name, volume, seed in tasks)
        for task, found in zip(tasks, pool.imap(_run, given), strict=True):
            known["/".join(map(str, task))] = asdict(found)
            if keep is not None:
                write_atomically(keep, json.dumps(known).encode())
            if time.monotonic() > end:
                pool.terminate()
                break
    for name in named:
        by_volume: dict[str, list[Progress]] = {}
        for key, entry in sorted(known.items()):
            its_name, volume, seed = key.rsplit("/", 2)
            if its_name == name and int(seed) < seeds and _serves(entry, goals[volume]):
                by_volume.setdefault(volume, []).append(progress_of(entry))
        yield name, by_volume


def _serves(entry: Mapping[str, Any] | None, goal: float) -> bool:
    """Return whether what was kept of a study goes as far as a goal."""
    return entry is not None and entry.get("goal", 0.0) <= goal


def progress_of(entry: Mapping[str, Any]) -> Progress:
    """Return what was kept of a study."""
    times, best = (tuple(map(float, entry[key])) for key in ("seconds", "best"))
    return Progress(times, best, entry["finished"], entry["pruned"], entry.get("goal", 0.0))


def goal(runs: Runs, reference: str, volume: str) -> float:
    """Return what random search ends with on a volume: the median of its seeds."""
    return statistics.median(run.at(full_budget(volume)) for run in runs[reference][volume])


def shares(runs: Runs, name: str, reference: str = "random, repeats") -> list[float]:
    """Return, for every study, the share of the budget until random search's end was reached."""
    found = []
    for volume, studies in runs[name].items():
        budget = full_budget(volume)
        wanted = goal(runs, reference, volume)
        found += [study.time_to(wanted) / budget for study in studies]
    return found


def quartiles(found: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles of shares; never is infinity."""
    low, middle, high = np.quantile(found, [0.25, 0.5, 0.75], method="nearest")
    return float(low), float(middle), float(high)


def report(runs: Runs, name: str) -> None:
    """Print a line about a strategy."""
    columns = []
    for reference in (RANDOM.name, RANDOM_ONCE.name):
        low, middle, high = quartiles(found := shares(runs, name, reference))
        never = sum(map(math.isinf, found)) / len(found)
        columns.append(f"{_share(middle)} ({_share(low)} to {_share(high)}), {never:>4.0%} never")
    bests = "  ".join(
        f"{statistics.median(run.at(full_budget(volume)) for run in each):.4f}"
        for volume, each in runs[name].items()
        if not any(run.goal for run in each)
    )
    studies = [run for each in runs[name].values() for run in each]
    complete = statistics.fmean(run.finished for run in studies)
    pruned = statistics.fmean(run.pruned for run in studies)
    ends = f"{complete:.0f} complete, {pruned:.0f} paused; {len(studies)} studies"
    print(f"{name:<38} {columns[0]:>35} {columns[1]:>35}   {bests}   {ends}", flush=True)


def _share(value: float) -> str:
    """Return a share for people; never is a word."""
    return "never" if math.isinf(value) else f"{value:.2f}"


def plot(runs: Runs, path: Path) -> None:
    """Draw how many studies have what random search ends with, as time goes by, for each volume."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(volumes()), 3.6), layout="constrained")
    panels = figure.subplots(1, len(volumes()), squeeze=False, sharey=True)[0]
    for axes, volume in zip(panels, volumes(), strict=True):
        budget, wanted = full_budget(volume), goal(runs, RANDOM.name, volume)
        for index, (name, by_volume) in enumerate(runs.items()):
            times = sorted(study.time_to(wanted) / budget for study in by_volume[volume])
            reached = [0.0, *(time for time in times if math.isfinite(time)), 1.0]
            steps = [*range(len(reached) - 1), len(reached) - 2]
            axes.step(reached, [step / len(times) for step in steps], color=f"C{index}",
                      where="post", label=name)  # fmt: skip
        title = SHOWN.get(volume, f"Phantom {volume}")
        axes.set(title=title, xlabel="Share of the budget", xlim=(0, 1), ylim=(0, 1))
    panels[0].set_ylabel("Share of studies with\nrandom search's last error")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip
    figure.savefig(path, dpi=110)


def main() -> None:
    """Simulate, print, and draw where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--processes", type=int, default=usable_cores())
    parser.add_argument("--variants", action="store_true", help="other samplers and pruners too")
    parser.add_argument("--keep", type=Path, help="file of what was run, to go on from")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after that")
    parser.add_argument("--to-goal", action="store_true", help="end each study at its goal")
    parser.add_argument("--plot", type=Path, help="file to draw into")
    parser.add_argument("--write-shelf", action="store_true", help="only write the shelf's table")
    arguments = parser.parse_args()
    if arguments.write_shelf:
        SHELF.write_text(shelf_text(), "utf-8")
        return
    strategies: list[Strategy | None] = [*MAIN, None]
    if arguments.variants:
        strategies += variants()
    print(f"{len(curves(volumes()[0]))} candidates really trained on {len(volumes())} volumes, "
          f"{arguments.seeds} seeds each, {WORKERS} simulated GPUs, "
          f"a budget of {TRIALS} full trainings")  # fmt: skip
    end = time.monotonic() + 60 * arguments.minutes
    given = arguments.seeds, arguments.processes, arguments.keep, end
    runs: Runs = dict(run_all([RANDOM, RANDOM_ONCE], *given))
    goals = None
    if arguments.to_goal:
        goals = {volume: min(goal(runs, name, volume) for name in runs) for volume in volumes()}
    runs |= dict(
        run_all([each for each in strategies if each not in (RANDOM, RANDOM_ONCE)], *given, goals)
    )
    wanted = len(volumes()) * arguments.seeds
    left = sum(wanted - sum(map(len, of_name.values())) for of_name in runs.values())
    if left:
        print(f"{left} studies are still to be run")
    print(f"{'':<38} {'share of the budget to reach':>35} {'the same of random':>35}   best error,")
    print(f"{'strategy':<38} {'random with repeats at its end':>35} {'without repeats':>35}   "
          f"median of seeds, on {', '.join(volumes())}")  # fmt: skip
    runs = {name: of_name for name, of_name in runs.items() if of_name}
    for name in runs:
        report(runs, name)
    if left:
        return
    for strategy, median, upper, share in TARGETS:
        _, middle, high = quartiles(found := shares(runs, strategy.name))
        never = sum(map(math.isinf, found)) / len(found)
        met = middle <= median and high <= upper and never <= share
        print(f"target: {strategy.name}: {median:g}, upper quartile {upper:g}, never {share:.0%}: "
              f"{middle:.3f}, {high:.3f}, {never:.1%}, {'met' if met else 'MISSED'}")  # fmt: skip
    cold, misled = (statistics.median(shares(runs, each.name)) for each in (COLD, MISLED))
    print(f"target: a misleading study costs at most a fifth of the cold time: {cold:.3f} becomes "
          f"{misled:.3f}, {'met' if misled <= 1.2 * cold else 'MISSED'}")  # fmt: skip
    if arguments.plot is not None:
        shown = [RANDOM.name, RANDOM_ONCE.name, COLD.name, ONE.name, TWO.name, SHELVED.name]
        plot({name: runs[name] for name in shown}, arguments.plot)


if __name__ == "__main__":
    main()
