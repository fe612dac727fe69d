"""Losses by name: an entry declares the arguments of `loss_kwargs` with their defaults and rules.

The checks here need no PyTorch. To add a loss, write a function of (logits, target, mask) with
keyword-only arguments that returns a scalar, and call `register_loss`.
"""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Rule = Callable[[Any], str | None]
"""Function of a value that returns what it must be where it is not."""


@dataclass(frozen=True)
class LossArgument:
    """An argument of a loss.

    Args:
        default: Value used where `loss_kwargs` does not set it.
        rule: Returns what a value must be where it is not, or None.
    """

    default: Any
    rule: Rule


@dataclass(frozen=True)
class Loss:
    """A loss of logits against a target, both (B, C, Z, Y, X), inside a mask (B, 1, Z, Y, X).

    Args:
        function: Function of (logits, target, mask) and keyword-only arguments that returns a
            scalar, or its `module:name`.
        arguments: Its keyword arguments; None are those of its signature, which are checked by
            running it on a few voxels.
        together: Returns what is wrong with all arguments together, or None.
    """

    function: Callable[..., Tensor] | str
    arguments: Mapping[str, LossArgument] | None = None
    together: Rule = lambda arguments: None

    def __call__(self, logits: Tensor, target: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        """Return the loss, a scalar in float32."""
        value: Tensor = self.resolved()(logits, target, mask, **{**self.defaults(), **kwargs})
        return value

    def resolved(self) -> Callable[..., Tensor]:
        """Return the function."""
        if isinstance(self.function, str):
            found: Callable[..., Tensor] = pkgutil.resolve_name(self.function)
            return found
        return self.function

    def defaults(self) -> dict[str, Any]:
        """Return every argument with its default."""
        if self.arguments is not None:
            return {key: argument.default for key, argument in self.arguments.items()}
        parameters = inspect.signature(self.resolved()).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


LOSSES: dict[str, Loss] = {}


def register_loss(name: str, loss: Loss | Callable[..., Tensor]) -> None:
    """Add a loss to the table, or replace the one of that name.

    Args:
        name: What `model.loss_functions` calls it.
        loss: An entry, or a function of (logits, target, mask) with keyword-only arguments.

    Raises:
        ValueError: An argument of the function has no default.
    """
    entry = loss if isinstance(loss, Loss) else Loss(loss)
    required = [k for k, value in entry.defaults().items() if value is inspect.Parameter.empty]
    if required:
        raise ValueError(f"Loss '{name}': its argument {required[0]} has no default. Give one.")
    LOSSES[name] = entry


def loss_arguments(name: str) -> dict[str, Any]:
    """Return the keyword arguments that a loss accepts, with their defaults.

    Args:
        name: A name of `LOSSES`.

    Raises:
        ValueError: The loss is unknown.
    """
    return _known(name).defaults()


def check_loss(name: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse a loss or arguments that would fail in training.

    Args:
        name: A name of `LOSSES`.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: The loss or an argument is unknown, or a value is out of range.
    """
    loss = _known(name)
    defaults = loss.defaults()
    for key, value in kwargs.items():
        if key not in defaults:
            raise ValueError(
                f"{name} takes no argument '{key}'. Known: {', '.join(sorted(defaults))}."
            )
        if loss.arguments is not None:
            wanted = loss.arguments[key].rule(value)
        else:
            wanted = boolean(value) if isinstance(defaults[key], bool) else None
        if wanted is not None:
            raise ValueError(f"{name}: {key} is {value!r}, but must {wanted}.")
    fault = loss.together({**defaults, **kwargs})
    if fault is not None:
        raise ValueError(f"{name}: {fault}")
    if loss.arguments is None:
        _run_on_few_voxels(name, loss, kwargs)


def _run_on_few_voxels(name: str, loss: Loss, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that the function itself cannot take."""
    import torch

    voxels = torch.zeros(1, 1, 1, 2, 2)
    try:
        value = loss(voxels, voxels, torch.ones_like(voxels, dtype=torch.bool), **kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    if value.ndim or not value.isfinite():
        raise ValueError(
            f"{name} returns {value} with {dict(kwargs)}, but must return a finite scalar."
        )


def _known(name: str) -> Loss:
    """Return the entry of a loss."""
    if name not in LOSSES:
        raise ValueError(f"Unknown loss '{name}'. Known: {', '.join(sorted(LOSSES))}.")
    return LOSSES[name]


def number(*, above: float | None = None, to: float = math.inf) -> Rule:
    """Return the rule of a finite number from 0, or above a bound, up to another."""

    def rule(value: Any) -> str | None:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not math.isfinite(value):
            return "be a finite number"
        if above is not None and not value > above:
            return f"be above {above:g}"
        if above is None and value < 0:
            return "not be negative"
        return f"lie between 0 and {to:g}" if value > to else None

    return rule


def boolean(value: Any) -> str | None:
    """Return what a switch must be."""
    return None if isinstance(value, bool) else "be true or false"


def _or_none(rule: Rule) -> Rule:
    """Return a rule that lets None pass."""
    return lambda value: None if value is None else rule(value)


def _logits_only(value: Any) -> str | None:
    """Return what `sigmoid` must be where a cross-entropy is part of the loss."""
    return None if value is True else "be true, since it takes logits. Leave it out"


def _positive_or_balanced(value: Any) -> str | None:
    """Return what the weight of one class must be."""
    if value in (None, "balanced", "auto") or number(above=0)(value) is None:
        return None
    return "be a number above 0 or 'balanced'"


def _mean_or_sum(value: Any) -> str | None:
    """Return what a reduction to a scalar must be."""
    return None if value in ("mean", "sum") else "be mean or sum"


def _some_error_counts(arguments: Mapping[str, Any]) -> str | None:
    """Return what is wrong where neither kind of error costs anything."""
    if arguments["alpha"] + arguments["beta"] > 0:
        return None
    return "alpha and beta must not be negative nor both 0."


_FROM_0 = number()
_REDUCTION = {"reduction": LossArgument("mean", _mean_or_sum)}
_OVERLAP = {
    "sigmoid": LossArgument(True, boolean),
    "batch": LossArgument(False, boolean),
    "smooth_nr": LossArgument(1e-5, _FROM_0),
    "smooth_dr": LossArgument(1e-5, number(above=0)),
    **_REDUCTION,
}
_FOREGROUND = {"foreground_weight": LossArgument(None, _positive_or_balanced)}
_VOXELS = {**_FOREGROUND, **_REDUCTION}
_FOCAL = {"gamma": LossArgument(2.0, _FROM_0), "alpha": LossArgument(None, _or_none(number(to=1)))}
_TANH = {"tanh": LossArgument(False, boolean)}
_FACTOR = LossArgument(1.0, _FROM_0)
_LOGITS = {"sigmoid": LossArgument(True, _logits_only)}

_FUNCTIONS = "hydralv_tune.numerics.losses.functions"
_DICE = Loss(
    f"{_FUNCTIONS}:dice",
    {
        "squared_pred": LossArgument(False, boolean),
        "jaccard": LossArgument(False, boolean),
        **_OVERLAP,
    },
)
_BCE = Loss(
    f"{_FUNCTIONS}:bce_with_logits",
    {"pos_weight": LossArgument(None, _positive_or_balanced), **_VOXELS},
)
_SQUARED = Loss(f"{_FUNCTIONS}:mean_squared", {**_TANH, **_VOXELS})
_ABSOLUTE = Loss(f"{_FUNCTIONS}:mean_absolute", {**_TANH, **_VOXELS})
_TWO_PARTS = {**_OVERLAP, **_LOGITS, **_FOREGROUND, "lambda_dice": _FACTOR}

LOSSES.update(
    {
        "DiceLoss": _DICE,
        "DiceCELoss": Loss(f"{_FUNCTIONS}:dice_ce", {**_TWO_PARTS, "lambda_ce": _FACTOR}),
        "DiceFocalLoss": Loss(
            f"{_FUNCTIONS}:dice_focal", {**_TWO_PARTS, **_FOCAL, "lambda_focal": _FACTOR}
        ),
        "TverskyLoss": Loss(
            f"{_FUNCTIONS}:tversky",
            {"alpha": LossArgument(0.5, _FROM_0), "beta": LossArgument(0.5, _FROM_0), **_OVERLAP},
            together=_some_error_counts,
        ),
        "FocalLoss": Loss(f"{_FUNCTIONS}:focal", {**_FOCAL, **_VOXELS}),
        "BCEWithLogitsLoss": _BCE,
        "WeightedBCEWithLogitsLoss": _BCE,
        "SmoothL1Loss": Loss(
            f"{_FUNCTIONS}:smooth_l1", {"beta": LossArgument(1.0, _FROM_0), **_TANH, **_VOXELS}
        ),
        "MSELoss": _SQUARED,
        "WeightedMSELoss": _SQUARED,
        "L1Loss": _ABSOLUTE,
        "WeightedMAELoss": _ABSOLUTE,
    }
)
