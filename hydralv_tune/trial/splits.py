"""What a trial trains on and what it is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from hydralv_tune.config.candidate import Candidate, Data, Split
from hydralv_tune.config.errors import ConfigError, VolumeError, unknown_name
from hydralv_tune.data.volumes import Volume, Windowed
from hydralv_tune.numerics.networks.registry import network_arguments
from hydralv_tune.trial.fitted_normalisation import with_normalisation
from hydralv_tune.trial.training.lazy_reader import has_truth

AXES = "zyx"
CHOSEN_THERE = "; thresholds and best checkpoint were chosen there, so the score is optimistic"
"""What is untrained is not unseen: the sweep and every evaluation look at what is scored."""


@dataclass(frozen=True)
class Fold:
    """One network: what it trains on and what it is scored on.

    Args:
        name: `all`, or `fold_1` and on.
        train: Volumes or parts of them.
        score: Volumes or parts of them.
    """

    name: str
    train: tuple[Volume, ...]
    score: tuple[Volume, ...]


@dataclass(frozen=True)
class SplitPlan:
    """The folds, and what a reader of the score must know.

    Args:
        kind: As in `data.split.kind`.
        sentence: What was trained on and what was scored.
        folds: One, or one per fold of a cross-validation.
        margin: Voxels between the two along the axis; None where no slab is cut.
    """

    kind: str
    sentence: str
    folds: tuple[Fold, ...]
    margin: int | None = None

    def as_mapping(self) -> dict[str, Any]:
        """Return what the record keeps."""
        return {
            "kind": self.kind,
            "sentence": self.sentence,
            "margin_voxels": self.margin,
            "folds": [
                {
                    "name": fold.name,
                    "train": [describe(volume) for volume in fold.train],
                    "score": [describe(volume) for volume in fold.score],
                }
                for fold in self.folds
            ],
        }


def describe(volume: Volume) -> str:
    """Return name and shape of a volume."""
    return f"{volume.name} {'×'.join(str(side) for side in volume.image.shape)}"


def needed_margin(candidate: Candidate) -> Sequence[int]:
    """Return the receptive field (z, y, x) where slabs are held out by it, and 0 elsewhere.

    Measuring it takes seconds for a network of five levels.

    Raises:
        ValueError: The network cannot be built.
    """
    split, model = candidate.data.split, candidate.model
    if split.kind not in ("holdout", "cross_validation", "blocks") or split.margin is not None:
        return (0, 0, 0)
    from hydralv_tune.numerics.networks.receptive_field import receptive_field

    return receptive_field(model.architecture, network_arguments(model.model_dump()))


def split_volumes(
    volumes: Sequence[Volume],
    data: Data,
    *,
    receptive_field: Sequence[int],
    held_out: Sequence[Volume] = (),
) -> SplitPlan:
    """Return the folds of a trial; each part carries the normalisation of its whole volume.

    Args:
        volumes: With labels.
        data: `data` of the candidate, with its `split`.
        receptive_field: Voxels (z, y, x) that one output voxel sees; the margin where the split
            says none.
        held_out: Volumes of their own to score on, for `kind: volumes`.

    Raises:
        VolumeError: A volume has no labels, or a part is left without any inside the mask.
        ConfigError: A held-out volume is unknown, none is named, or all are.
    """
    if not volumes:
        raise VolumeError("There is no volume to train on.")
    for volume in (*volumes, *held_out):
        if volume.label is None:
            raise VolumeError(
                f"Volume '{volume.name}': it has no label, but training and scoring need "
                "instance labels. Give --label."
            )
    volumes, held_out = (
        [with_normalisation(v, data) for v in group] for group in (volumes, held_out)
    )
    split = data.split
    margin = receptive_field[split.axis] if split.margin is None else split.margin
    if split.kind == "none":
        plan = SplitPlan(
            "none",
            "trained and scored on the same volume: thresholds and score are optimistic",
            (Fold("all", tuple(volumes), tuple(volumes)),),
        )
    elif split.kind == "holdout":
        plan = _holdout(volumes, split, margin)
    elif split.kind == "volumes":
        plan = _by_name(volumes, split, held_out)
    elif split.kind == "blocks":
        plan = _folds_of_blocks(volumes, split, receptive_field)
    elif len(volumes) >= split.folds:
        plan = _folds_of_volumes(volumes, split)
    else:
        plan = _folds_of_slabs(volumes, split, margin)
    for fold in plan.folds:
        for part in (*fold.train, *fold.score):
            _check_labelled(part)
    return plan


def slab(volume: Volume, axis: int, start: int, stop: int) -> Volume:
    """Return the part of a volume from `start` up to `stop` along an axis, without copying.

    Args:
        volume: Whole; the part keeps its normalisation.
        axis: 0, 1 or 2 for z, y, x.
        start: First voxel.
        stop: Voxel after the last.
    """
    z, y, x = (slice(start, stop) if a == axis else slice(None) for a in range(3))

    def cut(array: Any) -> Any:
        return array.cut((z, y, x)) if isinstance(array, Windowed) else array[z, y, x]

    fitted = volume.normalisation
    if fitted is not None and axis == 0:
        fitted = fitted.of_sections(start, stop)
    return replace(
        volume,
        name=f"{volume.name}[{AXES[axis]} {start}:{stop}]",
        image=cut(volume.image),
        label=None if volume.label is None else cut(volume.label),
        mask=None if volume.mask is None else cut(volume.mask),
        scored_mask=None if volume.scored_mask is None else cut(volume.scored_mask),
        normalisation=fitted,
    )


def _check_labelled(volume: Volume) -> None:
    """Refuse a part in which there is nothing to learn or to score."""
    if not has_truth(volume):
        inside = "" if volume.where_scored is None else " inside the mask"
        raise VolumeError(
            f"Volume '{volume.name}': the label has no labelled voxel{inside}, so adapted "
            "Rand error is undefined. Check the label path, move data.split, or drop the volume."
        )


def _holdout(volumes: Sequence[Volume], split: Split, margin: int) -> SplitPlan:
    """Return one fold that holds out a slab of each volume."""
    train, score = [], []
    for volume in volumes:
        length = volume.image.shape[split.axis]
        held = max(round(split.fraction * length), 1)
        left = length - held - margin
        if left < 1:
            raise VolumeError(
                f"Volume '{volume.name}': {length} voxels along {AXES[split.axis]} hold a slab of "
                f"{held} and a margin of {margin}, which leaves {left} to train on. Set "
                "data.split.margin, a smaller data.split.fraction, or another data.split.axis."
            )
        if split.side == "high":
            train.append(slab(volume, split.axis, 0, left))
            score.append(slab(volume, split.axis, length - held, length))
        else:
            train.append(slab(volume, split.axis, length - left, length))
            score.append(slab(volume, split.axis, 0, held))
    sentence = (
        f"scored on the {split.side} {split.fraction:.0%} of {AXES[split.axis]}, held out with a "
        f"margin of {margin} voxels{CHOSEN_THERE}"
    )
    return SplitPlan("holdout", sentence, (Fold("all", tuple(train), tuple(score)),), margin=margin)


def _by_name(volumes: Sequence[Volume], split: Split, held_out: Sequence[Volume]) -> SplitPlan:
    """Return one fold that is scored on volumes of their own."""
    names = {volume.name for volume in volumes}
    for name in split.volumes:
        if name not in names:
            raise ConfigError(f"data.split.volumes: {unknown_name('volume', name, names)}")
    train = tuple(volume for volume in volumes if volume.name not in split.volumes)
    score = (*(volume for volume in volumes if volume.name in split.volumes), *held_out)
    if not score:
        raise ConfigError(
            "data.split: kind is volumes, but none is held out. Name some in data.split.volumes "
            f"(there are {', '.join(sorted(names))}), or give data.val_image and data.val_label."
        )
    if not train:
        raise ConfigError("data.split.volumes: every volume is held out; none is left to train on.")
    sentence = f"scored on {', '.join(v.name for v in score)}, not trained on{CHOSEN_THERE}"
    return SplitPlan("volumes", sentence, (Fold("all", train, score),))


def _folds_of_volumes(volumes: Sequence[Volume], split: Split) -> SplitPlan:
    """Return folds that each hold out every k-th volume."""
    folds = []
    for index in range(split.folds):
        score = tuple(volumes[index :: split.folds])
        train = tuple(v for i, v in enumerate(volumes) if i % split.folds != index)
        folds.append(Fold(f"fold_{index + 1}", train, score))
    sentence = (
        f"mean over {split.folds} folds of {len(volumes)} volumes, each scored by a network not "
        f"trained on it{CHOSEN_THERE}"
    )
    return SplitPlan("cross_validation", sentence, tuple(folds))


def _folds_of_slabs(volumes: Sequence[Volume], split: Split, margin: int) -> SplitPlan:
    """Return folds that each hold out one slab of every volume, with a margin on both sides."""
    folds = []
    for index in range(split.folds):
        train, score = [], []
        for volume in volumes:
            length = volume.image.shape[split.axis]
            start, stop = (length * i // split.folds for i in (index, index + 1))
            score.append(slab(volume, split.axis, start, stop))
            sides = ((0, start - margin), (stop + margin, length))
            kept = [slab(volume, split.axis, a, b) for a, b in sides if b - a > 0]
            # A remainder without any instance teaches nothing and is left out.
            kept = [part for part in kept if has_truth(part)]
            if not kept:
                raise VolumeError(
                    f"Volume '{volume.name}': a margin of {margin} voxels around slab {index + 1} "
                    f"of {split.folds} along {AXES[split.axis]} leaves nothing to train on. Set "
                    "data.split.margin, or another data.split.axis."
                )
            train.extend(kept)
        folds.append(Fold(f"fold_{index + 1}", tuple(train), tuple(score)))
    sentence = (
        f"mean over {split.folds} slabs along {AXES[split.axis]}, each held out in turn with a "
        f"margin of {margin} voxels{CHOSEN_THERE}"
    )
    return SplitPlan("cross_validation", sentence, tuple(folds), margin=margin)


def _folds_of_blocks(
    volumes: Sequence[Volume], split: Split, receptive_field: Sequence[int]
) -> SplitPlan:
    """Return folds that each hold out one block of space of every volume.

    Trained on is what lies beside the block, further away than the margin: on each side along each
    cut axis, as large as the volume has it, so these parts share their corners. A block of a volume
    without truth is held out by no fold; a fold that no volume has truth for does not exist.
    """
    for volume in volumes:
        for letter, side, count in zip(AXES, volume.image.shape, split.blocks, strict=True):
            if count > side:
                raise VolumeError(
                    f"Volume '{volume.name}': data.split.blocks cuts {letter} into {count}, but it "
                    f"has {side} voxels there. Set fewer data.split.blocks."
                )
    margins = [side if split.margin is None else split.margin for side in receptive_field]
    cut = [axis for axis in range(3) if split.blocks[axis] > 1]
    folds: list[Fold] = []
    for place in product(*(range(count) for count in split.blocks)):
        train: list[Volume] = []
        score: list[Volume] = []
        for volume in volumes:
            spans = [
                tuple(side * i // count for i in (index, index + 1))
                for side, index, count in zip(volume.image.shape, place, split.blocks, strict=True)
            ]
            block = volume
            for axis in cut:
                block = slab(block, axis, *spans[axis])
            if has_truth(block):
                score.append(block)
            for axis in cut:
                low, high = spans[axis]
                length, margin = volume.image.shape[axis], margins[axis]
                sides = ((0, low - margin), (high + margin, length))
                parts = [slab(volume, axis, a, b) for a, b in sides if b - a > 0]
                train.extend(part for part in parts if has_truth(part))
        if score:
            folds.append(Fold(f"fold_{len(folds) + 1}", tuple(train), tuple(score)))
    if len(folds) < 2:
        raise VolumeError(
            f"data.split.blocks is {list(split.blocks)}, but truth lies in {len(folds)} of the "
            "blocks, and one is held out at a time. Set others, or data.split.kind: none."
        )
    for fold in folds:
        if not fold.train:
            raise VolumeError(
                f"Volume '{fold.score[0].name}': a margin of {[margins[axis] for axis in cut]} "
                f"voxels along {', '.join(AXES[axis] for axis in cut)} leaves nothing to train "
                "on. Set data.split.margin, or fewer data.split.blocks."
            )
    sentence = (
        f"mean over {len(folds)} of {'×'.join(map(str, split.blocks))} blocks (z×y×x) of each "
        f"volume, each held out in turn with a margin of "
        f"{', '.join(f'{margins[axis]} voxels along {AXES[axis]}' for axis in cut)}{CHOSEN_THERE}"
    )
    margin = max(margins[axis] for axis in cut)
    return SplitPlan("blocks", sentence, tuple(folds), margin=margin)
