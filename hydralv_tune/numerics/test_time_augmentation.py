"""Test-time augmentation: each distinct flip and quarter turn once, and how they are joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

AXES = "zyx"
ENSEMBLES = ("mean", "min", "max")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "none": lambda logits: logits,
}


@dataclass(frozen=True, order=True)
class Transform:
    """A flip and quarter turn of a volume: axes exchanged, then some of them reversed.

    Args:
        order: Which axis of the input (0 is z) each axis of the output is.
        flips: Axes of the output that are reversed.
    """

    order: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[int, ...] = ()

    def apply(self, volume: Tensor) -> Tensor:
        """Return the transformed volume.

        Args:
            volume: (B, C, Z, Y, X).
        """
        turned = volume.permute(0, 1, *(axis + 2 for axis in self.order))
        return turned.flip([axis + 2 for axis in self.flips]) if self.flips else turned

    def invert(self, volume: Tensor) -> Tensor:
        """Return the volume that `apply` made this one of.

        Args:
            volume: (B, C, ...), transformed.
        """
        straight = volume.flip([axis + 2 for axis in self.flips]) if self.flips else volume
        back = [self.order.index(axis) + 2 for axis in range(3)]
        return straight.permute(0, 1, *back)

    def shape(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Return the shape (z, y, x) that a volume of that shape gets."""
        z, y, x = (size[axis] for axis in self.order)
        return z, y, x

    def __str__(self) -> str:
        """Return what is done, in axes' letters."""
        turn = "" if self.order == (0, 1, 2) else "".join(AXES[axis] for axis in self.order)
        flip = "flip " + "".join(AXES[axis] for axis in self.flips) if self.flips else ""
        return " ".join(part for part in (turn, flip) if part) or "as it is"


def distinct_transforms(
    flip_axes: str | Sequence[int | Sequence[int]] | None = "all",
    rotation90_axes: str | Sequence[Sequence[int]] | None = ((1, 2),),
    rotate90_k: Sequence[int] | None = None,
) -> tuple[Transform, ...]:
    """Return every distinct combination of a flip and a quarter turn once, the identity first.

    All flips with the quarter turns of the section plane are 16, not 8 × 4 = 32: turning twice
    is flipping both axes.

    Args:
        flip_axes: `all` is every subset of z, y, x; a list of axes (0 is z) every subset of
            those; a list of lists exactly those flips; None none.
        rotation90_axes: Planes, each a pair of axes; `all` is every plane; None none.
        rotate90_k: Numbers of quarter turns, of 0 to 3; None is all.

    Raises:
        ValueError: An axis is not 0, 1 or 2, a plane no pair of two, or a turn not 0 to 3.

    Source: the keys are PyTorch Connectomics', where axis 0 was the channel and transforms
        were repeated.
    """
    turns = {Transform()}
    for a, b in _planes(rotation90_axes):
        swapped = [0, 1, 2]
        swapped[a], swapped[b] = b, a
        z, y, x = swapped
        for k in _quarter_turns(rotate90_k):
            turns.add(
                {
                    0: Transform(),
                    1: Transform((z, y, x), (a,)),
                    2: Transform((0, 1, 2), tuple(sorted((a, b)))),
                    3: Transform((z, y, x), (b,)),
                }[k]
            )
    found = {
        Transform(turn.order, tuple(sorted(set(turn.flips) ^ set(flip))))
        for turn in turns
        for flip in _flips(flip_axes)
    }
    return tuple(sorted(found))


def unfit_turn(
    transforms: Sequence[Transform], size: Sequence[int], multiples: Sequence[int]
) -> tuple[int, int, int] | None:
    """Return the first shape a window is turned into that an architecture cannot take, if any.

    Args:
        transforms: As `distinct_transforms` returns them.
        size: Of the window (z, y, x).
        multiples: What the sides must be multiples of (z, y, x).
    """
    for transform in transforms:
        turned = transform.shape(size)
        if any(side % d for side, d in zip(turned, multiples, strict=True)):
            return turned
    return None


def activate(logits: Tensor, activations: Sequence[Sequence[Any]]) -> Tensor:
    """Return probabilities of logits, each range of channels through its activation.

    Args:
        logits: (B, C, Z, Y, X).
        activations: [first channel, end, name] of each range; names of `ACTIVATIONS`.

    Raises:
        ValueError: An entry is malformed, a channel is missing or twice, or a name is unknown.
    """
    parts: dict[int, Tensor] = {}
    for entry in activations:
        if len(entry) != 3 or not all(isinstance(bound, int) for bound in entry[:2]):
            raise ValueError(
                f"channel_activations holds {list(entry)}, but must be [first channel, end, name], "
                'like [0, 1, "sigmoid"].'
            )
        first, end, name = entry
        key = "none" if name in (None, "linear", "identity") else name
        if key not in ACTIVATIONS:
            raise ValueError(f"Unknown activation '{name}'. Known: {', '.join(ACTIVATIONS)}.")
        for channel in range(first, end):
            if channel in parts or not 0 <= channel < logits.shape[1]:
                raise ValueError(
                    f"channel_activations names channel {channel} twice or beyond the "
                    f"{logits.shape[1]} of the network: {[list(e) for e in activations]}."
                )
            parts[channel] = ACTIVATIONS[key](logits[:, channel])
    missing = [c for c in range(logits.shape[1]) if c not in parts]
    if missing:
        raise ValueError(f"channel_activations says nothing of channel {missing[0]}.")
    return torch.stack([parts[channel] for channel in sorted(parts)], dim=1)


def join_transforms(
    predict: Callable[[Tensor], Tensor],
    volume: Tensor,
    transforms: Sequence[Transform],
    mode: str = "mean",
) -> Tensor:
    """Return what a network says of a volume under all transforms, turned back and joined.

    Args:
        predict: Function of (B, 1, z, y, x) that gives (B, C, z, y, x).
        volume: (B, 1, Z, Y, X).
        transforms: As `distinct_transforms` returns them.
        mode: One of `ENSEMBLES`.

    Raises:
        ValueError: The mode is unknown, or there is no transform.
    """
    if mode not in ENSEMBLES:
        raise ValueError(f"Unknown ensemble_mode '{mode}'. Known: {', '.join(ENSEMBLES)}.")
    if not transforms:
        raise ValueError("test-time augmentation has no transform; the identity is the least.")
    joins: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "mean": torch.add, "min": torch.minimum, "max": torch.maximum,
    }  # fmt: skip
    joined: Tensor | None = None
    for transform in transforms:
        # Contiguous: convolutions are slow on flipped and permuted views.
        part = transform.invert(predict(transform.apply(volume).contiguous()))
        joined = part if joined is None else joins[mode](joined, part)
    assert joined is not None
    return joined / len(transforms) if mode == "mean" else joined


def _flips(flip_axes: str | Sequence[int | Sequence[int]] | None) -> list[tuple[int, ...]]:
    """Return the sets of axes that are reversed, the empty one among them.

    Raises:
        ValueError: An axis is not 0, 1 or 2.
    """
    if flip_axes is None:
        return [()]
    entries: Sequence[int | Sequence[int]] = (0, 1, 2) if flip_axes == "all" else _listed(flip_axes)
    axes = [entry for entry in entries if isinstance(entry, int)]
    if len(axes) == len(entries):
        _check_axes(axes, "flip_axes")
        return [c for n in range(len(axes) + 1) for c in combinations(sorted(set(axes)), n)]
    chosen = [(entry,) if isinstance(entry, int) else tuple(entry) for entry in entries]
    for flip in chosen:
        _check_axes(flip, "flip_axes")
    return [(), *(tuple(sorted(set(flip))) for flip in chosen)]


def _planes(rotation90_axes: str | Sequence[Sequence[int]] | None) -> list[tuple[int, int]]:
    """Return the planes that are turned.

    Raises:
        ValueError: One is no pair of two axes.
    """
    if rotation90_axes is None:
        return []
    if rotation90_axes == "all":
        return [(0, 1), (0, 2), (1, 2)]
    planes = []
    for plane in _listed(rotation90_axes):
        if isinstance(plane, int) or len(plane) != 2 or len(set(plane)) != 2:
            raise ValueError(
                f"rotation90_axes holds {plane}, but must hold pairs of axes, like [1, 2]."
            )
        _check_axes(plane, "rotation90_axes")
        planes.append((plane[0], plane[1]))
    return planes


def _listed(value: Any) -> Sequence[Any]:
    """Return a list.

    Raises:
        ValueError: It is a word other than `all`.
    """
    if isinstance(value, str):
        raise ValueError(f"'{value}' is neither a list of axes nor all. Try [1, 2].")
    return list(value)


def _quarter_turns(rotate90_k: Sequence[int] | None) -> Sequence[int]:
    """Return the numbers of quarter turns.

    Raises:
        ValueError: One is not 0 to 3.
    """
    turns = (1, 2, 3) if rotate90_k is None else rotate90_k
    if any(k not in (0, 1, 2, 3) for k in turns):
        raise ValueError(f"rotate90_k is {list(turns)}, but quarter turns must be 0 to 3.")
    return turns


def _check_axes(axes: Sequence[int], key: str) -> None:
    """Refuse an axis that a volume does not have.

    Raises:
        ValueError: It is not 0 (z), 1 (y) or 2 (x).
    """
    if any(axis not in (0, 1, 2) for axis in axes):
        raise ValueError(f"{key} holds {list(axes)}, but axes are 0 (z), 1 (y) and 2 (x).")
