"""Search training configurations and decoding thresholds for 3D vesicle segmentation.

Each name below is imported when it is first used, so importing the package costs nothing.
docs/howto/python.md shows them at work, docs/reference/api.md says what each takes and gives.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hydralv_tune.api.studies import RunOptions as RunOptions
    from hydralv_tune.api.studies import StudyResults as StudyResults
    from hydralv_tune.api.studies import export_best as export_best
    from hydralv_tune.api.studies import open_study as open_study
    from hydralv_tune.api.studies import run_study as run_study
    from hydralv_tune.api.studies import segment as segment
    from hydralv_tune.api.studies import write_report as write_report
    from hydralv_tune.api.volumes import decode as decode
    from hydralv_tune.api.volumes import predict as predict
    from hydralv_tune.api.volumes import read_volume as read_volume
    from hydralv_tune.api.volumes import score as score
    from hydralv_tune.api.volumes import sweep as sweep
    from hydralv_tune.api.volumes import train as train
    from hydralv_tune.config.candidate import Candidate as Candidate
    from hydralv_tune.config.errors import CheckpointError as CheckpointError
    from hydralv_tune.config.errors import ConfigError as ConfigError
    from hydralv_tune.config.errors import HydraLVError as HydraLVError
    from hydralv_tune.config.errors import InputError as InputError
    from hydralv_tune.config.errors import StudyError as StudyError
    from hydralv_tune.config.errors import TrialFailed as TrialFailed
    from hydralv_tune.config.errors import TrialInterrupted as TrialInterrupted
    from hydralv_tune.config.errors import VolumeError as VolumeError
    from hydralv_tune.config.files import load_candidate as load_candidate
    from hydralv_tune.config.search_space import SearchSpace as SearchSpace
    from hydralv_tune.config.search_space_files import load_space as load_space
    from hydralv_tune.data.volumes import Volume as Volume
    from hydralv_tune.data.volumes import VolumePaths as VolumePaths
    from hydralv_tune.numerics.augmentation.registry import Augmentation as Augmentation
    from hydralv_tune.numerics.augmentation.registry import (
        register_augmentation as register_augmentation,
    )
    from hydralv_tune.numerics.losses.registry import register_loss as register_loss
    from hydralv_tune.numerics.metrics.registry import Metric as Metric
    from hydralv_tune.numerics.metrics.registry import register_metric as register_metric
    from hydralv_tune.numerics.networks.registry import Architecture as Architecture
    from hydralv_tune.numerics.networks.registry import Key as Key
    from hydralv_tune.numerics.networks.registry import (
        register_architecture as register_architecture,
    )
    from hydralv_tune.numerics.phantom.volume import make_phantom as make_phantom
    from hydralv_tune.numerics.watershed.decoders import register_decoder as register_decoder
    from hydralv_tune.study.pruners import register_pruner as register_pruner
    from hydralv_tune.study.samplers import register_sampler as register_sampler

_HOMES = {
    "api.studies": (
        "RunOptions", "StudyResults", "export_best", "open_study", "run_study", "segment",
        "write_report",
    ),
    "api.volumes": ("decode", "predict", "read_volume", "score", "sweep", "train"),
    "config.candidate": ("Candidate",),
    "config.errors": (
        "CheckpointError", "ConfigError", "HydraLVError", "InputError", "StudyError",
        "TrialFailed", "TrialInterrupted", "VolumeError",
    ),
    "config.files": ("load_candidate",),
    "config.search_space": ("SearchSpace",),
    "config.search_space_files": ("load_space",),
    "data.volumes": ("Volume", "VolumePaths"),
    "numerics.augmentation.registry": ("Augmentation", "register_augmentation"),
    "numerics.losses.registry": ("register_loss",),
    "numerics.networks.registry": ("Architecture", "Key", "register_architecture"),
    "numerics.metrics.registry": ("Metric", "register_metric"),
    "numerics.phantom.volume": ("make_phantom",),
    "numerics.watershed.decoders": ("register_decoder",),
    "study.pruners": ("register_pruner",),
    "study.samplers": ("register_sampler",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    """Return a public name, imported now."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hydralv_tune' has no attribute '{name}'")
    found = getattr(import_module(f"hydralv_tune.{_HOME_OF[name]}"), name)
    if name.startswith("register_"):
        from hydralv_tune.config.plugins import recorded

        found = recorded(found)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
