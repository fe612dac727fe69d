"""Networks by name: an entry declares the keys it reads, and everything else follows from that.

The checks here need no PyTorch, so a candidate is refused before it is imported. Every network
takes (B, 1, Z, Y, X) and returns logits (B, 3, Z, Y, X); with deep supervision, in training mode,
a list of them from fine to coarse. To add one, write a function that builds it from its keys and
call `register_architecture`.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Size3 = tuple[int, int, int]
Keys = Mapping[str, Any]

FILTERS = (32, 64, 128, 256, 512)
COMMON_KEYS = frozenset({"in_channels", "out_channels", "filters", "deep_supervision"})
OTHER_KEYS = frozenset(
    {"architecture", "input_size", "output_size", "deep_supervision_weights", "loss_functions",
     "loss_weights", "loss_kwargs", "multi_task_config", "loss_balancing",
     "external_weights_path", "external_weights_key_prefix", "external_weights_strict"}
)  # fmt: skip
"""Keys of a `model` block that do not determine the network."""

NO_SUCH_PART = "it has no such part"
NORMS = ("batch", "instance", "group", "none")
ACTIVATIONS = ("relu", "leakyrelu", "elu", "prelu", "gelu", "swish", "mish")
GROUPS = 8
"""Groups of `norm: group` where `num_groups` is not set."""


@dataclass(frozen=True)
class Key:
    """A key of `model` that an architecture reads.

    Args:
        default: Value used where the key is not set.
        read: Function of (all keys, this key's name) that returns the checked value; it raises
            `ValueError` naming key, value and rule.
    """

    default: Any
    read: Callable[[Keys, str], Any]


@dataclass(frozen=True)
class Architecture:
    """How an architecture is built, which keys it reads, and which patches it can take.

    Args:
        build: Function of the checked keys that returns the network, or its `module:name`.
        keys: Keys of `model` that it reads beyond `COMMON_KEYS`.
        deep_supervision: Whether it can return logits of its coarser levels.
        levels: How many levels it then returns logits of; None is one for each of `filters`.
        divisor: Function of the checked keys that returns what the sides (z, y, x) of a patch must
            be multiples of.
        filters: Function that returns the checked widths of the levels.
        heads: First parts of the names of the modules that turn features into logits.
        refusals: Reason why a key that another architecture reads has no effect here.
        checked_by_building: Whether only building the network tells if its keys fit together.
    """

    build: Callable[[Keys], nn.Module] | str
    keys: Mapping[str, Key] = field(default_factory=dict)
    deep_supervision: bool = False
    levels: int | None = None
    divisor: Callable[[Keys], Size3] = lambda keys: (1, 1, 1)
    filters: Callable[[Sequence[int]], tuple[int, ...]] = lambda filters: several_levels(filters)
    heads: tuple[str, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    checked_by_building: bool = True


ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(name: str, entry: Architecture) -> None:
    """Add an architecture to the table, or replace the one of that name.

    Args:
        name: What `model.architecture` calls it.
        entry: How it is built and what it reads.

    Raises:
        ValueError: A key of the entry means something else in a `model` block.
    """
    taken = sorted(set(entry.keys) & (COMMON_KEYS | OTHER_KEYS))
    if taken:
        raise ValueError(
            f"Architecture '{name}' declares the key {taken[0]}, which every model has. Rename it."
        )
    ARCHITECTURES[name] = entry


def own_keys() -> frozenset[str]:
    """Return the keys of `model` that at least one architecture reads and another may not."""
    return frozenset(key for entry in ARCHITECTURES.values() for key in entry.keys)


def architecture(name: str) -> Architecture:
    """Return the entry of that name.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in ARCHITECTURES:
        raise ValueError(
            f"Unknown architecture '{name}'. Known: {', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[name]


def build_network(name: str, **keys: Any) -> nn.Module:
    """Return an untrained network.

    Args:
        name: A name of `ARCHITECTURES`.
        keys: Keys of `model`: `in_channels` (1), `out_channels` (3), `filters` (channels of each
            level, finest first), `deep_supervision` (False) and the architecture's own; None is
            not set.

    Raises:
        ValueError: The name is unknown, a key has no effect here, or a value is impossible.
    """
    entry, checked = architecture(name), checked_keys(name, keys)
    build = pkgutil.resolve_name(entry.build) if isinstance(entry.build, str) else entry.build
    network: nn.Module = build(checked)
    return network


def checked_keys(name: str, model: Keys) -> dict[str, Any]:
    """Return every key that the architecture reads, checked, with defaults where none is set.

    Args:
        name: A name of `ARCHITECTURES`.
        model: Keys of the `model` block that determine the network.

    Raises:
        ValueError: The name is unknown, a key has no effect here, or a value is impossible.
    """
    entry, given = architecture(name), _set_keys(model)
    refused = ignored_keys(name, given)
    if refused:
        raise ValueError("; ".join(refused.values()))
    keys = {"in_channels": 1, "out_channels": 3, "filters": FILTERS, "deep_supervision": False,
            **{key: declared.default for key, declared in entry.keys.items()}, **given}  # fmt: skip
    for key in ("in_channels", "out_channels"):
        if keys[key] < 1:
            raise ValueError(f"{key} is {keys[key]}, but must be at least 1.")
    keys["filters"] = entry.filters(keys["filters"])
    return {**keys, **{key: declared.read(keys, key) for key, declared in entry.keys.items()}}


def network_arguments(model: Keys) -> dict[str, Any]:
    """Return those keys of a `model` block that determine the network, as `build_network` takes.

    Args:
        model: The block as a mapping; losses, weights and the rest are left out.
    """
    return _set_keys({key: value for key, value in model.items() if key not in OTHER_KEYS})


def ignored_keys(name: str, model: Keys) -> dict[str, str]:
    """Return, for each key that is set but has no effect on the architecture, a sentence with why.

    Args:
        name: A name of `ARCHITECTURES`.
        model: Keys of the `model` block; those that are None count as not set.

    Raises:
        ValueError: The name is unknown.
    """
    entry, known = architecture(name), own_keys()
    refused = {}
    for key, value in _set_keys(model).items():
        if key in COMMON_KEYS or key in entry.keys or key in OTHER_KEYS:
            continue
        if key in known:
            reason = entry.refusals.get(key, NO_SUCH_PART)
            accepted = ", ".join(sorted(entry.keys)) or "no further key"
            refused[key] = (
                f"{key} is {value}, but it has no effect on {name}: {reason}. Accepted: {accepted}."
            )
        else:
            refused[key] = f"Unknown key '{key}' of {name}. Known: {', '.join(sorted(known))}."
    if model.get("deep_supervision") and not entry.deep_supervision:
        refused["deep_supervision"] = f"deep_supervision is true, but {name} has no coarser logits."
    return refused


def divisor(name: str, model: Keys) -> Size3:
    """Return what (z, y, x) of a patch must be multiples of.

    Args:
        name: A name of `ARCHITECTURES`.
        model: Keys of the `model` block.

    Raises:
        ValueError: The name is unknown or a value is impossible.
    """
    return architecture(name).divisor(checked_keys(name, network_arguments(model)))


def supervised_levels(name: str, model: Keys) -> int:
    """Return how many logits a network gives in training, from fine to coarse.

    Args:
        name: A name of `ARCHITECTURES`.
        model: Keys of the `model` block.

    Raises:
        ValueError: The name is unknown or a value is impossible.
    """
    keys = checked_keys(name, network_arguments(model))
    return (architecture(name).levels or len(keys["filters"])) if keys["deep_supervision"] else 1


def check_patch_size(name: str, model: Keys, patch_size: Sequence[int]) -> None:
    """Refuse a patch that the architecture cannot take.

    Args:
        name: A name of `ARCHITECTURES`.
        model: Keys of the `model` block.
        patch_size: Voxels (z, y, x).

    Raises:
        ValueError: A side is no multiple of the divisor, or the coarsest level is one voxel.
    """
    needed = divisor(name, model)
    if any(side % d for side, d in zip(patch_size, needed, strict=True)):
        near = tuple(max(1, round(s / d)) * d for s, d in zip(patch_size, needed, strict=True))
        raise ValueError(
            f"patch {tuple(patch_size)} (z, y, x) does not fit {name}, which needs multiples of "
            f"{needed}. Try {near}."
        )
    if tuple(patch_size) == needed and math.prod(needed) > 1:
        raise ValueError(
            f"patch {tuple(patch_size)} (z, y, x) leaves a single voxel at the coarsest level of "
            f"{name}, which no normalisation can work on. Try twice the size in y and x."
        )


def several_levels(filters: Sequence[int]) -> tuple[int, ...]:
    """Return the widths of the levels.

    Raises:
        ValueError: There are fewer than two, or one is below 1.
    """
    widths = tuple(filters)
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(
            f"filters is {list(widths)}, but must hold two levels or more of at least 1 channel. "
            "Try [16, 32, 64]."
        )
    return widths


def _set_keys(model: Keys) -> dict[str, Any]:
    """Return the keys that are set; a dropout of 0 is what every network has without it."""
    return {
        key: value
        for key, value in model.items()
        if value is not None and not (key == "dropout" and value == 0)
    }


def _size3(value: object, key: str) -> Size3:
    """Return a size (z, y, x) from one number or three."""
    sizes = [value] * 3 if isinstance(value, int) else value
    if (
        not isinstance(sizes, Sequence)
        or len(sizes) != 3
        or not all(isinstance(s, int) and s >= 1 for s in sizes)
    ):
        raise ValueError(
            f"{key} is {value}, but must be a positive integer or three of them (z, y, x)."
        )
    z, y, x = sizes
    return int(z), int(y), int(x)


def _odd_size3(keys: Keys, key: str) -> Size3:
    """Return a kernel size (z, y, x), odd so that the shape is kept."""
    size = _size3(keys[key], key)
    if not all(s % 2 for s in size):
        raise ValueError(f"{key} is {keys[key]}, but kernels must be odd. Try 3 or [1, 3, 3].")
    return size


def one_of(*known: Any) -> Callable[[Keys, str], Any]:
    """Return a reader that refuses a value outside those known."""

    def read(keys: Keys, key: str) -> Any:
        if keys[key] not in known:
            raise ValueError(
                f"Unknown {key} '{keys[key]}'. Known: {', '.join(str(value) for value in known)}."
            )
        return keys[key]

    return read


def _level_factors(keys: Keys, key: str) -> list[Size3]:
    """Return the factors (z, y, x) between the levels; [1, 2, 2] each where none is set."""
    steps = len(keys["filters"]) - 1
    given = keys[key] or [[1, 2, 2]] * steps
    if len(given) != steps:
        raise ValueError(
            f"{key} has {len(given)} entries, but filters {list(keys['filters'])} have {steps} "
            "steps between levels. Give one entry for each, like [1, 2, 2]."
        )
    return [_size3(entry, f"{key}.{i}") for i, entry in enumerate(given)]


def _flat_factors_first(keys: Keys, key: str) -> list[Size3]:
    """Return factors between levels: [1, 2, 2] as often as wanted, then [2, 2, 2]."""
    factors = _level_factors(keys, key)
    flat = sum(factor == (1, 2, 2) for factor in factors)
    if factors != [(1, 2, 2)] * flat + [(2, 2, 2)] * (len(factors) - flat):
        raise ValueError(
            f"{key} is {keys[key]}, but monai_segresnet takes [1, 2, 2] first, as often as wanted, "
            "then [2, 2, 2]."
        )
    return factors


def _share_below_1(keys: Keys, key: str) -> float:
    """Return a share of channels."""
    share = float(keys[key])
    if not 0 <= share < 1:
        raise ValueError(f"{key} is {share}, but must be a share from 0 to below 1.")
    return share


def _whole(least: int) -> Callable[[Keys, str], int]:
    """Return a reader of a whole number from a least one."""

    def read(keys: Keys, key: str) -> int:
        if not isinstance(keys[key], int) or keys[key] < least:
            raise ValueError(f"{key} is {keys[key]}, but must be a whole number from {least}.")
        return int(keys[key])

    return read


def _levels_in_2d(keys: Keys, key: str) -> int:
    """Return how many of the finest levels have another kernel."""
    levels, fine = len(keys["filters"]), _whole(0)(keys, key)
    if fine > levels:
        raise ValueError(f"{key} is {fine}, but filters have {levels} levels. Try 1.")
    return fine


def group_count(channels: int, groups: int = GROUPS) -> int:
    """Return the largest divisor of a number of channels that is at most `groups`."""
    return max(count for count in range(1, min(groups, channels) + 1) if channels % count == 0)


def _product(factors: Sequence[Size3]) -> Size3:
    """Return the factor (z, y, x) from the finest to the coarsest level."""
    z, y, x = (math.prod(f[axis] for f in factors) for axis in range(3))
    return z, y, x


def _five_or_six_even(filters: Sequence[int]) -> tuple[int, ...]:
    """Return the six widths of BasicUNet: five levels and the last decoder's.

    Five are completed by the first: PyTorch Connectomics repeats the last, so that the decoder
    at full resolution is the widest layer of all.
    """
    widths = several_levels(filters)
    if len(widths) not in (5, 6):
        raise ValueError(
            f"filters is {list(widths)}, but monai_basic_unet3d needs five levels, and may take "
            "the last decoder's width as sixth. Try [16, 32, 64, 128, 256]."
        )
    odd = [f for f in widths[1:5] if f % 2]
    if odd:
        raise ValueError(f"filters {odd} are odd, but monai_basic_unet3d halves them. Add 1.")
    return widths if len(widths) == 6 else (*widths, widths[0])


def _doubled(filters: Sequence[int]) -> tuple[int, ...]:
    """Return widths that double from level to level."""
    widths = several_levels(filters)
    doubled = tuple(widths[0] * 2**i for i in range(len(widths)))
    if widths != doubled:
        raise ValueError(
            f"filters is {list(widths)}, but monai_segresnet doubles its width. "
            f"Try {list(doubled)}."
        )
    return widths


def _five_doubled(filters: Sequence[int]) -> tuple[int, ...]:
    """Return the widths of MedNeXt."""
    widths = several_levels(filters)
    doubled = tuple(widths[0] * 2**i for i in range(5))
    if widths != doubled:
        raise ValueError(
            f"filters is {list(widths)}, but mednext has five levels and doubles its width. "
            f"Try {list(doubled)}."
        )
    return widths


_BUILDERS = "hydralv_tune.numerics.networks.builders"
_NOT_MEDNEXT = "only mednext comes in sizes"
_ONE_KERNEL = dict.fromkeys(
    ("depth_2d", "kernel_2d"), "all its levels have the same kernel; rsunet's may differ"
)
_DROPOUT = Key(0.0, _share_below_1)
_NUM_GROUPS = Key(GROUPS, _whole(1))
_ACTIVATION = Key(None, one_of(None, *ACTIVATIONS))
"""None is the activation of MONAI's own."""

ARCHITECTURES.update({
    "rsunet": Architecture(
        build=f"{_BUILDERS}:build_rsunet",
        keys={
            "dropout": _DROPOUT,
            "norm": Key("batch", one_of(*NORMS)),
            "activation": Key("relu", one_of(*ACTIVATIONS)),
            "kernel_size": Key(3, _odd_size3),
            "down_factors": Key(None, _level_factors),
            "num_groups": _NUM_GROUPS,
            "depth_2d": Key(0, _levels_in_2d),
            "kernel_2d": Key((1, 3, 3), _odd_size3),
        },
        deep_supervision=True,
        divisor=lambda keys: _product(keys["down_factors"]),
        heads=("output_head", "ds_heads"),
        refusals={
            "strides": "it pools by down_factors instead",
            "num_res_units": "each block holds exactly one residual pair",
            "upsample": "its up-sampling is fixed bilinear interpolation",
            "mednext_size": _NOT_MEDNEXT,
            "mednext_kernel_size": "kernel_size is its key",
        },
        checked_by_building=False,
    ),
    "monai_basic_unet3d": Architecture(
        build=f"{_BUILDERS}:build_basic_unet",
        keys={
            "dropout": _DROPOUT,
            "norm": Key("instance", one_of(*NORMS[:3])),
            "activation": _ACTIVATION,
            "upsample": Key("deconv", one_of("deconv", "nontrainable", "pixelshuffle")),
            "num_groups": _NUM_GROUPS,
        },
        deep_supervision=True,
        levels=5,
        divisor=lambda keys: (16, 16, 16),
        filters=_five_or_six_even,
        heads=("final_conv", "ds_heads"),
        refusals={
            "kernel_size": "MONAI fixes its kernels at 3",
            "strides": "MONAI fixes its pooling at 2 in z, y and x",
            "num_res_units": "it has no residual units; monai_unet has",
            "down_factors": "MONAI fixes its pooling at 2 in z, y and x",
            "mednext_size": _NOT_MEDNEXT,
            "mednext_kernel_size": _NOT_MEDNEXT,
            **_ONE_KERNEL,
        },
        checked_by_building=False,
    ),
    "monai_unet": Architecture(
        build=f"{_BUILDERS}:build_unet",
        keys={
            "dropout": _DROPOUT,
            "norm": Key("instance", one_of(*NORMS[:3])),
            "activation": _ACTIVATION,
            "kernel_size": Key(3, _odd_size3),
            "strides": Key(None, _level_factors),
            "num_res_units": Key(2, _whole(0)),
            "num_groups": _NUM_GROUPS,
        },
        deep_supervision=True,
        divisor=lambda keys: _product(keys["strides"]),
        # Its last decoder gives logits itself.
        heads=("model.2", "ds_heads"),
        refusals={
            "down_factors": "strides is its key",
            "upsample": "it always up-samples by transposed convolution",
            "mednext_size": _NOT_MEDNEXT,
            "mednext_kernel_size": "kernel_size is its key",
            **_ONE_KERNEL,
        },
        checked_by_building=False,
    ),
    "monai_segresnet": Architecture(
        build=f"{_BUILDERS}:build_segresnet",
        keys={
            "norm": Key("instance", one_of(*NORMS[:3])),
            "activation": Key("leakyrelu", one_of(*ACTIVATIONS)),
            "strides": Key(None, _flat_factors_first),
            "num_groups": _NUM_GROUPS,
        },
        deep_supervision=True,
        divisor=lambda keys: _product(keys["strides"]),
        filters=_doubled,
        heads=("output_head", "ds_heads"),
        refusals={
            "dropout": "MONAI's SegResNetDS has none",
            "kernel_size": "it is 3, and 1 along z where a level keeps the sections apart",
            "num_res_units": "its encoder has 1, 3, 4 and then 6 a level, its decoder one",
            "down_factors": "strides is its key",
            "upsample": "it always up-samples by transposed convolution",
            "mednext_size": _NOT_MEDNEXT,
            "mednext_kernel_size": _NOT_MEDNEXT,
            **_ONE_KERNEL,
        },
        checked_by_building=False,
    ),
    "mednext": Architecture(
        build=f"{_BUILDERS}:build_mednext",
        keys={
            "mednext_size": Key("S", one_of("S", "B", "M", "L")),
            "mednext_kernel_size": Key(3, one_of(3, 5, 7)),
        },
        deep_supervision=True,
        divisor=lambda keys: (16, 16, 16),
        filters=_five_doubled,
        heads=("out_0", "out_blocks"),
        refusals={
            "dropout": "MedNeXt has no dropout",
            "norm": "MedNeXt normalises each channel by itself, by definition",
            "activation": "MedNeXt uses GELU, by definition",
            "kernel_size": "mednext_kernel_size is its key",
            "strides": "MedNeXt halves z, y and x at every level",
            "num_res_units": "mednext_size fixes its blocks",
            "down_factors": "MedNeXt halves z, y and x at every level",
            "upsample": "MedNeXt up-samples by transposed convolution",
            "num_groups": "MedNeXt normalises each channel by itself, by definition",
            **_ONE_KERNEL,
        },
        checked_by_building=False,
    ),
})  # fmt: skip
