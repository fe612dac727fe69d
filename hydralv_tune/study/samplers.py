"""The samplers of a study by name: one entry each, open for more.

Optuna is imported when a sampler is made, so that a search space is checked without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hydralv_tune.config.errors import InputError, unknown_name
from hydralv_tune.config.search_space import Sampler

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


@dataclass(frozen=True)
class SamplerEntry:
    """A sampler that a search space may name.

    Args:
        make: Returns Optuna's sampler from a seed and the number of random start-up trials.
        summary: One line for the documentation.
        is_sequence: Whether each proposal continues the one before, as in CMA-ES. Such a sampler
            is made once a run and keeps its seed; any other gets a fresh seed for each trial.
    """

    make: Callable[[int, int], BaseSampler]
    summary: str
    is_sequence: bool = False


def _tpe(seed: int, startup_trials: int) -> BaseSampler:
    """Return the tree-structured Parzen estimator."""
    from optuna.samplers import TPESampler

    return TPESampler(n_startup_trials=startup_trials, group=True, constant_liar=True, seed=seed)


def _random(seed: int, startup_trials: int) -> BaseSampler:
    """Return random search."""
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


def _gp(seed: int, startup_trials: int) -> BaseSampler:
    """Return Bayesian optimisation with a Gaussian process."""
    from optuna.samplers import GPSampler

    return GPSampler(seed=seed, n_startup_trials=startup_trials, warn_independent_sampling=False)


def _qmc(seed: int, startup_trials: int) -> BaseSampler:
    """Return a scrambled Sobol sequence."""
    from optuna.samplers import QMCSampler

    return QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)


def _cmaes(seed: int, startup_trials: int) -> BaseSampler:
    """Return CMA-ES, which keeps its state in this process."""
    from hydralv_tune.study.optuna_private import CmaEsWithoutPickle

    return CmaEsWithoutPickle(
        seed=seed, n_startup_trials=startup_trials, warn_independent_sampling=False
    )


SAMPLERS: dict[str, SamplerEntry] = {
    "tpe": SamplerEntry(_tpe, "Tree-structured Parzen estimator; models conditional branches."),
    "gp": SamplerEntry(_gp, "Gaussian process; for few trials and few parameters."),
    "random": SamplerEntry(_random, "Random search; the baseline of every other."),
    "cmaes": SamplerEntry(_cmaes, "CMA-ES; for continuous parameters.", is_sequence=True),
    "qmc": SamplerEntry(_qmc, "Scrambled Sobol sequence; covers the space evenly.", True),
}


def register_sampler(
    name: str,
    make: Callable[[int, int], BaseSampler],
    *,
    summary: str,
    is_sequence: bool = False,
) -> None:
    """Add a sampler that search spaces may name from now on.

    Args:
        name: As `sampler.name` of a search space gives it.
        make: Returns an Optuna sampler from a seed and the number of random start-up trials.
        summary: One line for the documentation.
        is_sequence: As in `SamplerEntry`.

    Raises:
        InputError: The name is taken.
    """
    if name in SAMPLERS:
        raise InputError(f"register_sampler: '{name}' is registered already. Choose another name.")
    SAMPLERS[name] = SamplerEntry(make, summary, is_sequence)


def sampler_entry(name: str) -> SamplerEntry:
    """Return the entry of a name.

    Raises:
        InputError: It is not registered in this process.
    """
    if name not in SAMPLERS:
        raise InputError(f"sampler.name: {unknown_name('sampler', name, SAMPLERS)}")
    return SAMPLERS[name]


def make_sampler(settings: Sampler, count: int) -> BaseSampler:
    """Return the sampler of the next trial.

    Each trial has a seed of its own, so that neither a second driver nor a restarted one draws the
    same random numbers again.

    Args:
        settings: Name, seed and start-up trials.
        count: Number of trials so far.

    Raises:
        InputError: The name is not registered in this process.
    """
    import optuna

    entry = sampler_entry(settings.name)
    seed = settings.seed if entry.is_sequence else (settings.seed * 1_000_003 + count) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return entry.make(seed, settings.startup_trials)
