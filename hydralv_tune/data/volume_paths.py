"""Which files make a volume: globs expanded, images, labels and masks matched by their order.

Light to import, so that a path is refused before any library is loaded.
"""

from __future__ import annotations

import glob
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydralv_tune.config.errors import VolumeError
from hydralv_tune.data.formats.location import Location, locate

GENERIC_STEMS = {"im", "img", "image", "images", "raw", "volume", "vol", "em", "main", "data"}
ROLES = GENERIC_STEMS | {
    *("label", "labels", "lab", "seg", "segmentation", "gt", "truth", "annotation", "instances"),
    *("mask", "masks", "valid", "roi"),
}
"""Words of a name that say what a file holds, not of which volume."""
NO_MASK = "none"
"""Stands for the mask of a volume that has none, among others that do."""


@dataclass(frozen=True)
class VolumePaths:
    """Where one volume lies.

    Args:
        name: What messages call it; unique within a study.
        image: File, or `file:dataset`.
        label: The same for the instance labels, or None.
        mask: The same for the tissue mask, or None where there is tissue everywhere.
        scored_mask: The same for where the truth is known, or None where the mask is.
        ignore_labels: Ids of the label that mean "no label".
    """

    name: str
    image: str
    label: str | None = None
    mask: str | None = None
    scored_mask: str | None = None
    ignore_labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignore_labels", tuple(self.ignore_labels))

    @property
    def files(self) -> list[str]:
        """Return what is read of it."""
        given = (self.image, self.label, self.mask, self.scored_mask)
        return [path for path in given if path is not None]


def volume_paths(
    images: Sequence[str | Path],
    labels: Sequence[str | Path] = (),
    masks: Sequence[str | Path] = (),
    scored_masks: Sequence[str | Path] = (),
    ignore_labels: Sequence[int] = (),
) -> list[VolumePaths]:
    """Return one entry for each image, with `~` and globs expanded.

    Args:
        images: Files, `file:dataset` or globs; a glob stands for its matches in natural order.
        labels: None at all, or as many as images, in the same order.
        masks: None at all, or as many as images, in the same order; `none` where one has no mask.
        scored_masks: None at all, or as many as images, in the same order.
        ignore_labels: Ids that mean "no label" in every label.

    Names that disagree within a volume, as `vol_1` and `vol_2`, are warned of.

    Raises:
        VolumeError: A glob matches nothing, no image is given, or the numbers differ.
    """
    image_files = files_of(images)
    label_files = files_of(labels)
    mask_files, scored_files = (
        [None if mask == NO_MASK else mask for mask in files_of(given)]
        for given in (masks, scored_masks)
    )
    if not image_files:
        raise VolumeError("No image is given. Name at least one with --image.")
    for option, files in (
        ("--label", label_files),
        ("--mask", mask_files),
        ("--scored-mask", scored_files),
    ):
        if files and len(files) != len(image_files):
            some = ", ".join(str(file or NO_MASK) for file in files[:3])
            hint = "" if option == "--label" else f" '{option} {NO_MASK}' stands for no mask."
            raise VolumeError(
                f"{option} names {len(files)} files ({some}{', ...' if len(files) > 3 else ''}), "
                f"but --image names {len(image_files)}. Give one {option} for each --image, in the "
                f"same order, or none at all.{hint}"
            )
    volumes = [
        VolumePaths(
            name=name,
            image=image,
            label=label_files[index] if label_files else None,
            mask=mask_files[index] if mask_files else None,
            scored_mask=scored_files[index] if scored_files else None,
            ignore_labels=tuple(ignore_labels),
        )
        for index, (name, image) in enumerate(zip(_names(image_files), image_files, strict=True))
    ]
    if len(volumes) > 1:
        _warn_of_pairs(volumes)
    return volumes


def _warn_of_pairs(volumes: Sequence[VolumePaths]) -> None:
    """Warn of names that disagree within a volume, and of a file that is given twice."""
    seen: dict[str, str] = {}
    for volume in volumes:
        for file in (volume.image, volume.label, volume.mask, volume.scored_mask):
            if file is not None and _differ(volume.image, file):
                warnings.warn(
                    f"{volume.image} goes with {file}, but their names differ: files are matched "
                    "by their order. Check the pairs, and that no file is missing.",
                    stacklevel=3,
                )
            if file is not None and seen.setdefault(file, volume.name) != volume.name:
                warnings.warn(
                    f"{file} is given for {seen[file]} and for {volume.name}. Check the pairs.",
                    stacklevel=3,
                )


def pairs(volumes: Sequence[VolumePaths]) -> list[str]:
    """Return one line for each volume that says which files belong together."""
    return [
        f"{v.name}: image {v.image}, label {v.label or 'none'}, mask {v.mask or NO_MASK}"
        + (f", scored mask {v.scored_mask}" if v.scored_mask else "")
        for v in volumes
    ]


def files_of(patterns: Sequence[str | Path]) -> list[str]:
    """Return the files that patterns stand for, each pattern in natural order."""
    files: list[str] = []
    for pattern in patterns:
        location = locate(pattern)
        text = str(location.path)
        if text == NO_MASK or location.path.exists() or not glob.has_magic(text):
            files.append(str(location))
            continue
        matches = sorted(glob.glob(text, recursive=True), key=_natural)
        if not matches:
            raise VolumeError(
                f"{pattern}: no file matches this pattern. Quote it, and check the folder."
            )
        files.extend(str(Location(Path(match), location.dataset)) for match in matches)
    return files


def _differ(image: str, other: str) -> bool:
    """Return whether two names seem to be of different volumes: by their numbers or their words.

    The folder is looked at where a stem says nothing.
    """
    own, others = (_telling(file) for file in (image, other))
    numbers, other_numbers = ([w for w in words if w.isdigit()] for words in (own, others))
    if numbers and other_numbers and [int(n) for n in numbers] != [int(n) for n in other_numbers]:
        return True
    named, other_named = ({w for w in words if not w.isdigit()} for words in (own, others))
    return bool(named and other_named) and not named & other_named


def _telling(file: str) -> list[str]:
    """Return the words and numbers of a file's name that say of which volume it is."""
    path = locate(file).path
    for name in (path.name.split(".")[0], path.absolute().parent.name):
        words = [w for w in re.findall(r"[a-z]+|[0-9]+", name.lower()) if w not in ROLES]
        if words:
            return words
    return []


def _natural(text: str) -> list[tuple[int, int | str]]:
    """Return a key that sorts `vol_2` before `vol_10`."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", text)]


def _names(files: Sequence[str]) -> list[str]:
    """Return a name for each image: its stem, or its folder where the stem says nothing."""
    names: list[str] = []
    for file in files:
        path = locate(file).path
        stem = path.name.split(".")[0]
        folder = path.absolute().parent.name
        name = folder if stem.lower() in GENERIC_STEMS and folder else stem
        number, unique = 2, name
        while unique in names:
            unique, number = f"{name}_{number}", number + 1
        names.append(unique)
    return names
