"""Probabilities to instances: `DECODERS` holds each decoder under its name.

A new one is a function of (probabilities, mask, keyword arguments) that leaves its input alone,
and one entry in the table, or `register_decoder` at run time. Numba is imported when something
is decoded, since names and arguments are checked where nothing is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hydralv_tune.numerics.watershed.graph import WatershedGraph

    Array = npt.NDArray[Any]
    Labels = npt.NDArray[np.int32]

Pair = Sequence[float | None]

FLOOR = 0.1
MOST_COMBINATIONS = 1_000_000
"""450 bytes a combination while the table is made: this many are 0.45 GB."""
MOST_DECODED = 10_000
"""The limit where each combination has to be decoded: hours, at a second each."""
CONTOUR = "decode_instance_binary_contour_distance"
THRESHOLDS = ("binary_threshold", "contour_threshold", "distance_threshold")


@dataclass(frozen=True)
class Argument:
    """One keyword argument of a decoder: its default, and which values it may have.

    Args:
        default: Taken where nothing is given.
        kind: `pair` is [seed, foreground], two numbers; `size` a number of voxels; `choice` one
            of `choices`; `any` is passed on unchecked.
        low, high: Range of a number, or of both of a pair; None is no limit.
        choices: Of a choice.
        may_be_off: Whether None, like infinity, switches the test off.
    """

    default: Any
    kind: Literal["pair", "number", "integer", "size", "choice", "any"]
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    may_be_off: bool = False

    def axes(self, name: str) -> tuple[str, ...]:
        """Return the axes that a sweep may give it."""
        if self.kind == "pair":
            return f"{name}.seed", f"{name}.foreground"
        return (name,) if self.kind in ("number", "integer", "size") else ()

    def checked(self, name: str, value: Any) -> Any:
        """Return one value, or one of a pair, as a number; infinity where it is off.

        Raises:
            ValueError: It is no number of the right kind. Its range is not looked at.
        """
        if self.kind in ("choice", "any"):
            return value
        if self.may_be_off and (value is None or value == math.inf):
            return math.inf
        number = isinstance(value, Real) and not isinstance(value, bool)  # NumPy's are Real too
        finite = number and math.isfinite(value)
        if self.kind == "size" and not (finite and int(value) == value and value >= 0):
            raise ValueError(f"{name} is {value!r}, but it is a number of voxels from 0 on")
        if self.kind == "integer" and not (finite and int(value) == value):
            raise ValueError(f"{name} is {value!r}, but it must be a whole number")
        if not finite:
            kind = "a threshold is" if self.kind == "pair" else "it must be"
            raise ValueError(f"{name} holds {value!r}, but {kind} a finite number")
        return int(value) if self.kind in ("integer", "size") else float(value)

    def checked_pair(self, name: str, pair: Any) -> tuple[float, float]:
        """Return (seed, foreground), each checked.

        Raises:
            ValueError: It is no pair of numbers.
        """
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{name} is {pair!r}, but it is a pair: [seed, foreground]")
        return self.checked(name, pair[0]), self.checked(name, pair[1])

    def problem(self, name: str, value: Any) -> str | None:
        """Return which rule a value of a configuration breaks, or None.

        Args:
            name: Of the argument, for the message.
            value: The whole one, or one of a pair.
        """
        if self.kind == "any" or (value is None and self.may_be_off):
            return None
        if self.kind == "choice":
            return None if value in self.choices else f"it is {' or '.join(map(str, self.choices))}"
        if self.kind == "size":
            whole = type(value) is int and value >= 0
            return None if whole else "it is a whole number of voxels from 0 on"
        if self.kind == "integer" and type(value) is not int:
            return "it is a whole number"
        if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
            return "a threshold is a number" if self.kind == "pair" else "it is a number"
        low, high = self.low, self.high
        if (low is None or value >= low) and (high is None or value <= high):
            return None
        words = name.partition(".")[0].replace("_", " ")
        if low is not None and high is not None:
            return f"a {words} must be in [{low:g}, {high:g}]"
        return f"a {words} must be at {'most' if low is None else 'least'} " + (
            f"{high:g}" if low is None else f"{low:g}"
        )


@dataclass(frozen=True)
class SweepForm:
    """How a sweep takes a decoder apart: one flood serves every foreground threshold.

    A sweep may give `min_seed_size` and `min_instance_size` axes too, and takes an argument
    `split_components` as true or false for all combinations.

    Args:
        seeds: Axes that decide the seeds, one for each channel of the graph.
        flood: Axes that decide where the flood runs; each of their values costs a graph.
        foreground: Axes that cut the flood afterwards, one for each channel, or none.
        signs: 1 for a channel that must be above its threshold, -1 for one below it.
        graph: Of (maps, mask, axes, fixed): what serves every combination.
        cut: Of (graph, value): the graph of one value of the flood axis.
    """

    seeds: tuple[str, ...]
    flood: tuple[str, ...]
    foreground: tuple[str, ...]
    signs: tuple[int, ...]
    graph: Callable[[Array, Array | None, Mapping[str, Any], Mapping[str, Any]], WatershedGraph]
    cut: Callable[[WatershedGraph, float], WatershedGraph] | None = None


@dataclass(frozen=True)
class Decoder:
    """A decoder: its function, its arguments, and how it is swept.

    Args:
        function: Of (probabilities (3, Z, Y, X), mask (Z, Y, X) or None, keyword arguments);
            returns labels (Z, Y, X), integers, 0 is background.
        arguments: Every keyword argument of the function.
        sweep: None where a sweep has to decode each combination, which takes the time of
            `decode` for each and is meant for small grids.
        domain: Of (probabilities, mask, every argument by name): the voxels, (Z, Y, X), whose
            26-connected components are decoded independently of each other, so that a volume can
            be decoded in parts. None where there is nothing like that.
        nodes: Of the same: the voxels of the domain that take most of the memory; all where None.
        by_section: Whether it reads probabilities as `probabilities[:, z]` alone, so that they
            may stay on disk.
    """

    function: Callable[..., Labels]
    arguments: Mapping[str, Argument]
    sweep: SweepForm | None = None
    domain: Callable[[Array, Array | None, Mapping[str, Any]], Array] | None = None
    nodes: Callable[[Array, Array | None, Mapping[str, Any]], Array] | None = None
    by_section: bool = False

    @property
    def most_combinations(self) -> int:
        """Return how many a sweep may have: by the memory of its table, or the time to decode."""
        return MOST_DECODED if self.sweep is None else MOST_COMBINATIONS

    @property
    def slow_axes(self) -> tuple[str, ...]:
        """Return the axes of which each combination costs a flood, or a decoding."""
        if self.sweep is None:
            return tuple(axis for name, own in self.arguments.items() for axis in own.axes(name))
        return *self.sweep.seeds, *self.sweep.flood, "min_seed_size"

    @property
    def axes(self) -> tuple[str, ...]:
        """Return every axis that a sweep may have, in the order of its table."""
        fast = () if self.sweep is None else ("min_instance_size", *self.sweep.foreground)
        return *self.slow_axes, *fast


def _above(values: Array, threshold: float) -> npt.NDArray[np.bool_]:
    """Return where finite values are above a threshold, compared in double precision.

    Halves from 0 on are in the order of their bits, and NumPy compares whole numbers fifty times
    as fast.
    """
    import numpy as np

    if values.dtype != np.float16 or threshold < 0:
        above: npt.NDArray[np.bool_] = values > np.float64(threshold)
        return above
    highest = np.float16(threshold)
    if float(highest) > threshold:
        highest = np.nextafter(highest, np.float16(0))
    return values.view(np.int16) > highest.view(np.int16)


def _contour_domain(
    maps: Array, mask: Array | None, arguments: Mapping[str, Any]
) -> npt.NDArray[np.bool_]:
    """Return where the flood of the contour decoder runs; seeds lie within."""
    import numpy as np

    if arguments["flood"] == "volume":
        return np.ones(maps.shape[1:], bool) if mask is None else mask > 0
    support = _above(maps[0], arguments["floor"]) | _above(maps[2], 0.0)
    return support if mask is None else support & (mask > 0)


def _contour_nodes(
    maps: Array, mask: Array | None, arguments: Mapping[str, Any]
) -> npt.NDArray[np.bool_]:
    """Return what may be a seed, foreground or a basin; the rest is flooded through alone."""
    floor = max(min(arguments["binary_threshold"]), 0.0)
    return _contour_domain(maps, mask, {"flood": "support", "floor": floor})


def _distance_domain(
    maps: Array, mask: Array | None, arguments: Mapping[str, Any]
) -> npt.NDArray[np.bool_]:
    """Return where the distance decoder has foreground or a seed."""
    found = _above(maps[2], min(arguments["distance_threshold"]))
    return found if mask is None else found & (mask > 0)


def _labels_of(
    graph: WatershedGraph, seeds: Array, min_seed_size: int, min_instance_size: int,
    split_components: bool,
) -> Labels:  # fmt: skip
    """Return the volume of labels after seeds and flood, renumbered from 1.

    Args:
        graph: Its needed nodes are the foreground.
        seeds: (channels,), float64, the seed thresholds.
        min_seed_size, min_instance_size: In voxels.
        split_components: Whether each 6-connected piece is an instance.
    """
    import numpy as np

    from hydralv_tune.numerics.watershed.flood import Workspace, keep_large, split

    space = Workspace(graph)
    kept, names, _ = keep_large(*space.seeds(seeds), min_seed_size)
    labels = np.where(graph.needed, space.flooded(kept, names), np.int32(0))
    if split_components:
        labels = split(labels, graph)
    sizes = np.bincount(labels, minlength=1)
    large = sizes >= max(min_instance_size, 1)
    large[0] = False
    renamed = np.where(large, np.cumsum(large), 0).astype(np.int32)
    volume = np.zeros(graph.box.shape, np.int32)
    found = np.flatnonzero(labels)
    volume.ravel()[graph.box.voxels_of(graph.nodes[found])] = renamed[labels[found]]
    return volume


def decode_instance_binary_contour_distance(
    probabilities: Array,
    mask: Array | None = None,
    *,
    binary_threshold: Pair = (0.5, 0.7),
    contour_threshold: Pair = (0.8, None),
    distance_threshold: Pair = (0.5, -0.5),
    min_seed_size: int = 4,
    min_instance_size: int = 0,
    split_components: bool = False,
    flood: str = "support",
    floor: float = FLOOR,
) -> Labels:
    """Return instances: seeds from three maps, a watershed on the distance, then foreground.

    Each pair is (seed, foreground). Seeds are 26-connected components of binary > seed,
    contour < seed, distance > seed. The flood does not depend on the foreground thresholds.

    Args:
        probabilities: (3, Z, Y, X), float16 or float32.
        mask: (Z, Y, X); only voxels above 0 are decoded. The whole volume where there is none.
        binary_threshold: In [0, 1].
        contour_threshold: In [0, 1]; above 1 or None is off.
        distance_threshold: In [-1, 1].
        min_seed_size: Seeds under so many voxels are dropped.
        min_instance_size: Instances under so many voxels are dropped.
        split_components: Each 6-connected piece of an instance becomes an instance of its own.
        flood: `support` floods only where binary > floor or distance > 0; `volume` floods the
            whole mask, as PyTorch Connectomics does.
        floor: Probability.

    Returns:
        (Z, Y, X), int32, ids from 1, 0 is background; empty where there is no seed.

    Raises:
        ValueError: The input or an argument breaks its rule.
    """
    import numpy as np

    from hydralv_tune.numerics.watershed.graph import contour_graph

    known, form = DECODERS[CONTOUR].arguments, DECODERS[CONTOUR].sweep
    assert form is not None
    given = dict(zip(THRESHOLDS, (binary_threshold, contour_threshold, distance_threshold),
                     strict=True))  # fmt: skip
    pairs = [known[name].checked_pair(name, pair) for name, pair in given.items()]
    least = known["min_seed_size"].checked("min_seed_size", min_seed_size)
    smallest = known["min_instance_size"].checked("min_instance_size", min_instance_size)
    seeds, limits = np.array(pairs).T * form.signs
    graph = contour_graph(
        probabilities, mask, seeds=seeds.tolist(), limits=limits.tolist(), flood=flood, floor=floor
    )
    return _labels_of(graph, seeds, least, smallest, split_components)


def decode_instance_watershed_distance(
    probabilities: Array,
    mask: Array | None = None,
    *,
    distance_threshold: Pair = (0.5, 0.0),
    min_seed_size: int = 4,
    min_instance_size: int = 0,
    split_components: bool = False,
) -> Labels:
    """Return instances from the distance alone.

    Foreground is distance > foreground, seeds are 26-connected components of distance > seed
    (cut to the foreground), and the flood runs inside the foreground on the Euclidean distance
    recomputed from it.

    Args:
        probabilities: (3, Z, Y, X), float16 or float32.
        mask: (Z, Y, X); only voxels above 0 are decoded.
        distance_threshold: (seed, foreground) in [-1, 1].
        min_seed_size: Seeds under so many voxels are dropped.
        min_instance_size: Instances under so many voxels are dropped.
        split_components: Each 6-connected piece of an instance becomes an instance of its own.

    Returns:
        (Z, Y, X), int32, ids from 1, 0 is background.

    Raises:
        ValueError: The input or an argument breaks its rule.
    """
    import numpy as np

    from hydralv_tune.numerics.watershed.graph import distance_graph, foreground_graph

    seed, low = DISTANCE_PAIR.checked_pair("distance_threshold", distance_threshold)
    least = SEED_SIZE.checked("min_seed_size", min_seed_size)
    smallest = INSTANCE_SIZE.checked("min_instance_size", min_instance_size)
    graph = distance_graph(probabilities, mask, seed=seed, lowest=min(seed, low))
    cut = foreground_graph(graph, low)
    return _labels_of(cut, np.array([seed]), least, smallest, split_components)


def _contour_graph(
    maps: Array, mask: Array | None, axes: Mapping[str, Any], fixed: Mapping[str, Any]
) -> WatershedGraph:
    """Return the graph that serves every combination of the axes."""
    from hydralv_tune.numerics.watershed.graph import contour_graph

    signed = list(zip(THRESHOLDS, (1, -1, 1), strict=True))
    seeds, limits = (
        [min(sign * value for value in axes[f"{name}.{part}"]) for name, sign in signed]
        for part in ("seed", "foreground")
    )
    extra = {key: fixed[key] for key in ("flood", "floor") if key in fixed}
    return contour_graph(maps, mask, seeds=seeds, limits=limits, **extra)


def _distance_graph(
    maps: Array, mask: Array | None, axes: Mapping[str, Any], fixed: Mapping[str, Any]
) -> WatershedGraph:
    """Return the graph from which that of each foreground threshold is cut."""
    from hydralv_tune.numerics.watershed.graph import distance_graph

    seeds, limits = axes["distance_threshold.seed"], axes["distance_threshold.foreground"]
    return distance_graph(maps, mask, seed=min(seeds), lowest=min(*seeds, *limits))


def _cut_to_foreground(graph: WatershedGraph, threshold: float) -> WatershedGraph:
    """Return the graph of one foreground threshold."""
    from hydralv_tune.numerics.watershed.graph import foreground_graph

    return foreground_graph(graph, threshold)


SEED_SIZE, INSTANCE_SIZE = Argument(4, "size"), Argument(0, "size")
SPLIT = Argument(False, "choice", choices=(False, True))
DISTANCE_PAIR = Argument((0.5, 0.0), "pair", -1.0, 1.0)
_DISTANCE = Decoder(
    decode_instance_watershed_distance,
    {
        "distance_threshold": DISTANCE_PAIR,
        "min_seed_size": SEED_SIZE,
        "min_instance_size": INSTANCE_SIZE,
        "split_components": SPLIT,
    },
    SweepForm(
        seeds=("distance_threshold.seed",),
        flood=("distance_threshold.foreground",),
        foreground=(),
        signs=(1,),
        graph=_distance_graph,
        cut=_cut_to_foreground,
    ),
    _distance_domain,
    by_section=True,
)
DECODERS: dict[str, Decoder] = {
    CONTOUR: Decoder(
        decode_instance_binary_contour_distance,
        {
            "binary_threshold": Argument((0.5, 0.7), "pair", 0.0, 1.0),
            "contour_threshold": Argument((0.8, None), "pair", 0.0, may_be_off=True),
            "distance_threshold": Argument((0.5, -0.5), "pair", -1.0, 1.0),
            "min_seed_size": SEED_SIZE,
            "min_instance_size": INSTANCE_SIZE,
            "split_components": SPLIT,
            "flood": Argument("support", "choice", choices=("support", "volume")),
            "floor": Argument(FLOOR, "number", 0.0, 1.0),
        },
        SweepForm(
            seeds=tuple(f"{name}.seed" for name in THRESHOLDS),
            flood=(),
            foreground=tuple(f"{name}.foreground" for name in THRESHOLDS),
            signs=(1, -1, 1),
            graph=_contour_graph,
        ),
        _contour_domain,
        _contour_nodes,
        by_section=True,
    ),
    "decode_instance_watershed_distance": _DISTANCE,
    "decode_distance_watershed": _DISTANCE,
}


def register_decoder(
    name: str,
    function: Callable[..., Labels],
    *,
    arguments: Mapping[str, Argument] | None = None,
    sweep: SweepForm | None = None,
    domain: Callable[[Array, Array | None, Mapping[str, Any]], Array] | None = None,
) -> Decoder:
    """Enter a decoder into `DECODERS`, and return it.

    Args:
        name: In configurations and on the command line.
        function: As `Decoder.function`.
        arguments: Left out, they are read from the function's keyword arguments: a float is a
            number, an int a whole number, a sequence of two numbers a pair, a bool a choice.
        sweep: As `Decoder.sweep`.
        domain: As `Decoder.domain`.

    Raises:
        ValueError: The name is taken, or a keyword argument has no default.
    """
    if name in DECODERS:
        raise ValueError(f"decoder name '{name}' is taken; give it another")
    known = read_arguments(function) if arguments is None else arguments
    DECODERS[name] = Decoder(function, known, sweep, domain)
    return DECODERS[name]


def read_arguments(function: Callable[..., Any]) -> dict[str, Argument]:
    """Return the arguments that the keyword arguments of a function stand for.

    Raises:
        ValueError: One has no default.
    """
    return {
        name: _inferred(name, parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _inferred(name: str, default: Any) -> Argument:
    """Return the argument that a default stands for."""
    if default is inspect.Parameter.empty:
        raise ValueError(f"keyword argument {name} of the decoder has no default; give it one")
    if isinstance(default, bool):
        return Argument(default, "choice", choices=(False, True))
    if isinstance(default, int | float):
        return Argument(default, "integer" if isinstance(default, int) else "number")
    numbers = isinstance(default, list | tuple) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in default
    )
    return Argument(default, "pair" if numbers and len(default) == 2 else "any")


def arguments_of(name: str) -> Mapping[str, Argument]:
    """Return the arguments of a decoder.

    Raises:
        ValueError: No decoder has that name.
    """
    if name not in DECODERS:
        raise ValueError(f"Unknown decoder '{name}'. Known: {', '.join(sorted(DECODERS))}.")
    return DECODERS[name].arguments


def decoder_arguments(name: str) -> dict[str, Any]:
    """Return the arguments of a decoder and their defaults.

    Raises:
        ValueError: No decoder has that name.
    """
    return {
        key: list(argument.default) if argument.kind == "pair" else argument.default
        for key, argument in arguments_of(name).items()
    }


def decode(name: str, probabilities: Array, mask: Array | None = None, **arguments: Any) -> Labels:
    """Return the instances that the decoder of that name finds.

    Args:
        name: A key of `DECODERS`.
        probabilities: (3, Z, Y, X), float16 or float32.
        mask: (Z, Y, X); only voxels above 0 are decoded.
        arguments: Of the decoder; what is left out takes its default.

    Returns:
        (Z, Y, X), int32, ids from 1, 0 is background.

    Raises:
        ValueError: The name or an argument is unknown, or the input breaks its rule.
    """
    known = arguments_of(name)
    for key in arguments:
        if key not in known:
            raise ValueError(f"Unknown argument '{key}' of {name}. Known: {', '.join(known)}.")
    labels = DECODERS[name].function(probabilities, mask, **arguments)
    if labels.shape != probabilities.shape[1:] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"decoder '{name}' returns {labels.dtype} labels of shape {labels.shape}, but must "
            f"return integers of shape {probabilities.shape[1:]}"
        )
    return labels
