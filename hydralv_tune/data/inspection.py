"""What is in a volume, and what is wrong with it, before any GPU hour is spent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from skimage.measure import label as label_pieces

from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.normalisation import fill_of

NAMED_IDS = 8
# Pieces of one id that lie further apart than this many radii of the larger are two objects.
FAR_RADII = 4.0
TINY_VOXELS = 30
TINY_SHARE = 0.1
LARGE_FACTOR = 20
FEW_INSTANCES = 10
SATURATED_SHARE = 0.02
UNIT_VOXELS = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Pieces:
    """The 26-connected pieces of all ids.

    Args:
        ids: (N,) the id of each piece.
        sizes: (N,) voxels of each piece.
        centres: (N, 3) centre of each piece in nm, or in voxels where no size is known.
        radii: (N,) radius of the ball of the same volume, in the same unit.
    """

    ids: np.ndarray
    sizes: np.ndarray
    centres: np.ndarray
    radii: np.ndarray


def characteristics(volume: Volume) -> dict[str, Any]:
    """Return the figures of a volume, and `warnings`: sentences with a next step.

    Fractions are of all voxels, `foreground_in_mask_fraction` of those in the mask. Without a
    label `instances` is None, and so are the figures that follow from it.

    Args:
        volume: As `read_volume` gives it.
    """
    warnings: list[str] = []
    facts: dict[str, Any] = {
        "shape": list(volume.image.shape),
        "dtype": str(volume.image.dtype),
        "voxel_size_nm": None if volume.voxel_size_nm is None else list(volume.voxel_size_nm),
    }
    if volume.note is not None:
        warnings.append(f"{volume.note[0].upper()}{volume.note[1:]}.")
    facts |= _label_facts(volume, warnings)
    facts |= _image_facts(volume, warnings)
    _judge_voxel_size(volume.voxel_size_nm, warnings)
    return {**facts, "warnings": warnings}


def _label_facts(volume: Volume, warnings: list[str]) -> dict[str, Any]:
    """Return the figures of label and mask; ids are those of the file."""
    label, mask = volume.label, volume.mask
    facts: dict[str, Any] = {
        "instances": None,
        "instance_size_voxels": None,
        "mask_fraction": 1.0 if mask is None else float(mask.mean()),
        "foreground_fraction": None,
        "foreground_in_mask_fraction": None,
    }
    if label is None:
        warnings.append("No label is given, so nothing can be trained or scored. Add --label.")
        return facts
    counts = np.bincount(label.ravel()) if label.max(initial=0) < 1 << 24 else None
    ids, sizes = _ids_and_sizes(label, counts)
    if not len(ids):
        warnings.append("The label has no labelled voxel. Check its path and dataset.")
        return {**facts, "instances": 0, "foreground_fraction": 0.0}
    inside = label if mask is None else label[mask]
    in_mask = int(np.count_nonzero(inside))
    pieces = find_pieces(label, volume.voxel_size_nm)
    fragmented, wrapped = (
        [volume.id_in_file(one) for one in broken] for broken in _broken_ids(pieces)
    )
    pairs = touching_pairs(label)
    facts |= {
        "instances": len(ids),
        "instance_size_voxels": {
            "min": int(sizes.min()),
            "mean": round(float(sizes.mean()), 1),
            "median": float(np.median(sizes)),
            "max": int(sizes.max()),
        },
        "foreground_fraction": float(sizes.sum() / label.size),
        "foreground_in_mask_fraction": in_mask / max(inside.size, 1),
        "instances_in_mask": int(np.count_nonzero(np.unique(inside))),
        "touching_instances": len(np.unique(pairs)),
        "touching_pairs": len(pairs),
        "fragmented_ids": fragmented,
        "wrapped_ids": wrapped,
        "label_voxels_outside_mask": int(sizes.sum()) - in_mask,
    }
    shown = ids if volume.label_ids is None else volume.label_ids[ids - 1]
    _judge_ids(label, shown, pieces, fragmented, wrapped, warnings)
    _judge_sizes(shown, sizes, warnings)
    _judge_mask(label, mask, ids, shown, sizes, warnings)
    return facts


def _ids_and_sizes(label: np.ndarray, counts: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids that occur and their voxels; 0 is left out."""
    if counts is None:
        ids, sizes = np.unique(label[label > 0], return_counts=True)
        return ids, sizes
    counts[0] = 0
    ids = np.flatnonzero(counts)
    return ids, counts[ids]


def find_pieces(label: np.ndarray, voxel_size_nm: tuple[float, float, float] | None) -> Pieces:
    """Return the 26-connected pieces of all ids; touching ids stay apart.

    Args:
        label: (Z, Y, X) integer ids.
        voxel_size_nm: Unit voxels where None.
    """
    numbered = label_pieces(label, background=0, connectivity=3)
    where = np.flatnonzero(numbered)
    piece = numbered.ravel()[where] - 1
    sizes = np.bincount(piece)
    ids = np.zeros(len(sizes), dtype=np.int64)
    ids[piece] = label.ravel()[where]
    size = np.asarray(voxel_size_nm or UNIT_VOXELS)
    centres = np.stack(
        [
            np.bincount(piece, weights=axis) / sizes * step
            for axis, step in zip(np.unravel_index(where, label.shape), size, strict=True)
        ],
        axis=1,
    )
    radii = (3 * sizes * size.prod() / (4 * np.pi)) ** (1 / 3)
    return Pieces(ids=ids, sizes=sizes, centres=centres, radii=radii)


def touching_pairs(label: np.ndarray) -> np.ndarray:
    """Return the pairs (N, 2) of ids that share a face, the smaller first.

    Args:
        label: (Z, Y, X) integer ids.
    """
    found = []
    for axis in range(label.ndim):
        a = np.moveaxis(label, axis, 0)[:-1]
        b = np.moveaxis(label, axis, 0)[1:]
        meets = (a != b) & (a > 0) & (b > 0)
        found.append(np.stack([a[meets], b[meets]], axis=1))
    pairs = np.sort(np.concatenate(found), axis=1)
    return np.unique(pairs, axis=0)


def _broken_ids(pieces: Pieces) -> tuple[list[int], list[int]]:
    """Return the ids of several pieces that lie together, and those whose pieces lie far apart."""
    fragmented: list[int] = []
    wrapped: list[int] = []
    ids, counts = np.unique(pieces.ids, return_counts=True)
    for one in ids[counts > 1]:
        own = np.flatnonzero(pieces.ids == one)
        largest = own[np.argmax(pieces.sizes[own])]
        apart = np.linalg.norm(pieces.centres[own] - pieces.centres[largest], axis=1)
        far = (apart > FAR_RADII * pieces.radii[largest]).any()
        (wrapped if far else fragmented).append(int(one))
    return fragmented, wrapped


def _named(ids: Iterable[Any]) -> str:
    """Return the first few ids, and how many more there are."""
    names = [str(i) for i in ids]
    more = len(names) - NAMED_IDS
    return ", ".join(names[:NAMED_IDS]) + (f" and {more} more" if more > 0 else "")


def _judge_ids(
    label: np.ndarray,
    ids: np.ndarray,
    pieces: Pieces,
    fragmented: Sequence[int],
    wrapped: Sequence[int],
    warnings: list[str],
) -> None:
    """Warn of ids that stand for several objects, or for a part of one."""
    if len(ids) == 1 and len(pieces.ids) > 1:
        warnings.append(
            f"The label holds the single id {ids[0]} in {len(pieces.ids)} separate pieces: it "
            "seems to be a binary mask, not instances. Number the pieces, for example with "
            "skimage.measure.label."
        )
        return
    if wrapped:
        cause = (
            f" The label is {label.dtype}, whose ids wrap at 256."
            if label.dtype.itemsize == 1
            else " Ids that were once stored as uint8 wrap at 256."
        )
        warnings.append(
            f"{len(wrapped)} of {len(ids)} ids have pieces far apart, so one id stands for "
            "several objects: "
            f"{_named(wrapped)}.{cause if ids.max() <= 255 else ''} Give each piece its own id "
            "with skimage.measure.label(label, connectivity=3)."
        )
    elif label.dtype.itemsize == 1 and ids.max() == 255:
        warnings.append(
            f"The label is {label.dtype} and its largest id is 255: where there are more objects, "
            "ids were lost. Save labels as uint16."
        )
    if fragmented:
        warnings.append(
            f"{len(fragmented)} of {len(ids)} ids consist of several pieces close together: "
            f"{_named(fragmented)}."
            " A decoder cannot join them; look at them, and join or renumber the pieces."
        )


def _judge_sizes(ids: np.ndarray, sizes: np.ndarray, warnings: list[str]) -> None:
    """Warn of instances too small, too large, or too few."""
    median = float(np.median(sizes))
    limit = max(TINY_VOXELS, TINY_SHARE * median)
    tiny = ids[sizes < limit]
    if len(tiny):
        warnings.append(
            f"{len(tiny)} of {len(ids)} instances have under {limit:.0f} voxels, against a "
            "median of "
            f"{median:.0f}: {_named(tiny)}. Remove them where they are slips of the brush, and "
            "keep min_instance_size below the smallest real one."
        )
    large = ids[sizes > LARGE_FACTOR * median]
    if len(large):
        warnings.append(
            f"{len(large)} of {len(ids)} instances have over {LARGE_FACTOR} times the median of "
            f"{median:.0f} "
            f"voxels: {_named(large)}. Large ones weigh by their size squared in adapted Rand "
            "error; check that they are single objects."
        )
    if len(ids) < FEW_INSTANCES:
        warnings.append(
            f"There are only {len(ids)} instances: each one moves F1 by about "
            f"{1 / len(ids):.2f}, so small differences between trials mean nothing. Add a volume "
            "if you can."
        )


def _judge_mask(
    label: np.ndarray,
    mask: np.ndarray | None,
    ids: np.ndarray,
    shown: np.ndarray,
    sizes: np.ndarray,
    warnings: list[str],
) -> None:
    """Warn of labels that the mask cuts or hides; `shown` are the ids as the file has them."""
    if mask is None:
        return
    if mask.all():
        warnings.append("The mask is valid everywhere, so it leaves nothing out. Check its path.")
        return
    outside_ids, outside = np.unique(label[~mask], return_counts=True)
    outside, outside_ids = outside[outside_ids > 0], outside_ids[outside_ids > 0]
    places = np.searchsorted(ids, outside_ids)
    whole = sizes[places]
    hidden, cut = shown[places[outside == whole]], shown[places[outside < whole]]
    if len(hidden):
        warnings.append(
            f"{len(hidden)} of {len(ids)} instances lie wholly outside the mask and count nowhere: "
            f"{_named(hidden)}. Widen the mask where they should count."
        )
    if len(cut):
        warnings.append(
            f"{len(cut)} of {len(ids)} instances are cut by the mask, "
            f"{int(outside[outside < whole].sum())} "
            f"voxels lie outside: {_named(cut)}. Only the part inside is scored; widen the mask, "
            "or accept it."
        )


def _image_facts(volume: Volume, warnings: list[str]) -> dict[str, Any]:
    """Return brightness and contrast, overall and by section, within the mask."""
    image, mask = volume.image, volume.mask
    rows = []
    for z in range(len(image)):
        values = image[z].ravel() if mask is None else image[z][mask[z]]
        if values.size:
            rows.append((z, values.size, *_moments(values)))
    table = np.asarray(rows, dtype=float)
    sections = table[:, 0].astype(int)
    weight = table[:, 1] / table[:, 1].sum()
    means, deviations = table[:, 2], table[:, 3]
    jumps = np.abs(np.diff(means))
    at = int(np.argmax(jumps)) if len(jumps) else 0
    facts: dict[str, Any] = {
        "intensity": {
            "min": float(table[:, 4].min()),
            "mean": round(float(means @ weight), 3),
            "max": float(table[:, 5].max()),
        },
        "section_mean": {
            "min": round(float(means.min()), 3),
            "max": round(float(means.max()), 3),
            "largest_jump": round(float(jumps.max(initial=0)), 3),
            "at_section": int(sections[min(at + 1, len(sections) - 1)]),
        },
        "section_contrast": {
            "min": round(float(deviations.min()), 3),
            "median": round(float(np.median(deviations)), 3),
            "max": round(float(deviations.max()), 3),
        },
    }
    if volume.label is not None:
        facts["foreground_contrast"] = _foreground_contrast(volume, float(np.median(deviations)))
    _judge_sections(table, warnings)
    _judge_copies(image, warnings)
    _judge_range(volume, table, warnings)
    return facts


def _moments(values: np.ndarray) -> tuple[float, float, float, float]:
    """Return mean, deviation, smallest and largest of one section."""
    exact = values if values.dtype.itemsize >= 4 else values.astype(np.float32)
    return (
        float(exact.mean(dtype=np.float64)),
        float(exact.std(dtype=np.float64)),
        float(values.min()),
        float(values.max()),
    )


def _foreground_contrast(volume: Volume, deviation: float) -> float | None:
    """Return how much darker instances are than the rest of the mask, in deviations."""
    assert volume.label is not None
    valid = np.ones(volume.image.shape, dtype=bool) if volume.mask is None else volume.mask
    foreground = (volume.label > 0) & valid
    background = valid & ~foreground
    if not foreground.any() or not background.any() or deviation == 0:
        return None
    inside = float(volume.image[foreground].mean(dtype=np.float64))
    rest = float(volume.image[background].mean(dtype=np.float64))
    return round((rest - inside) / deviation, 3)


def _judge_sections(table: np.ndarray, warnings: list[str]) -> None:
    """Warn of sections that are constant, jump in brightness, or have little contrast."""
    sections, means, deviations = table[:, 0].astype(int), table[:, 2], table[:, 3]
    constant = sections[deviations == 0]
    if len(constant):
        warnings.append(
            f"{len(constant)} of {len(sections)} sections are constant: {_named(constant)}. "
            "Leave them out with the "
            "mask, or fill them from their neighbours."
        )
    usual = float(np.median(deviations))
    jumps = np.abs(np.diff(means))
    if len(jumps) and usual > 0 and jumps.max() > 0.5 * usual:
        at = int(np.argmax(jumps))
        count = int((jumps > 0.5 * usual).sum())
        warnings.append(
            f"Brightness jumps between sections: their means run from {means.min():.0f} to "
            f"{means.max():.0f}, {count} of {len(jumps)} steps are over half the contrast, the "
            "largest between "
            f"{sections[at]} and {sections[at + 1]} (by {jumps[at]:.0f}). Keep intensity "
            "augmentation on, or normalise each section."
        )
    faint = sections[(deviations > 0) & (deviations < 0.4 * usual)]
    if len(faint):
        warnings.append(
            f"{len(faint)} of {len(sections)} sections have under 40 % of the usual contrast: "
            f"{_named(faint)}. Look "
            "at them; they may be out of focus."
        )


def _judge_copies(image: np.ndarray, warnings: list[str]) -> None:
    """Warn of sections that repeat the one before, as aligners put in for lost ones."""
    copies = [
        z
        for z in range(1, len(image))
        if np.array_equal(image[z], image[z - 1]) and image[z].min() != image[z].max()
    ]
    if copies:
        warnings.append(
            f"{len(copies)} of {len(image)} sections repeat the one before: {_named(copies)}. "
            "They stand for lost "
            "sections; leave them out with the mask where labels do not repeat too."
        )


def _judge_range(volume: Volume, table: np.ndarray, warnings: list[str]) -> None:
    """Warn of an image that is clipped, or black inside the mask."""
    image, mask = volume.image, volume.mask
    if image.dtype.kind not in "ui":
        return
    low, high = int(table[:, 4].min()), int(table[:, 5].max())
    if low == high:
        warnings.append(f"Every voxel of the image is {low}. Check its path and dataset.")
        return
    filled = sum(int(fill_of(section).sum()) for section in image) / image.size
    if filled > SATURATED_SHARE:
        warnings.append(
            f"{filled:.1%} of the voxels are fill: constant regions, as padding. Normalisation "
            f"leaves them out, so a volume without them looks the same to the network."
        )
    values = image.ravel() if mask is None else image[mask]
    for name, level in (("black", low), ("white", high)):
        share = float(np.count_nonzero(values == level) / values.size)
        if share > SATURATED_SHARE and level in (0, int(np.iinfo(image.dtype).max)):
            hint = (
                "Give a mask of the voxels that were imaged."
                if name == "black"
                else "What is clipped is lost; go back to the raw data if you can."
            )
            place = "of the image" if mask is None else "inside the mask"
            warnings.append(f"{share:.1%} of the voxels {place} are {name} ({level}). {hint}")


def _judge_voxel_size(size: tuple[float, float, float] | None, warnings: list[str]) -> None:
    """Warn where the voxel size is missing or looks wrong."""
    step = "Write it as the attribute voxel_size_nm (z, y, x) of the dataset."
    if size is None:
        warnings.append(
            "The voxel size is not in the files, so distances are taken in unit voxels. " + step
        )
        return
    shown = " x ".join(f"{value:g}" for value in size)
    if size == UNIT_VOXELS:
        warnings.append(f"The voxel size is {shown} nm, which tools write for unknown. {step}")
    elif min(size) < 0.5 or max(size) > 1000:
        warnings.append(
            f"The voxel size {shown} nm is outside 0.5 to 1000 nm: it may be in another unit. "
            + step
        )
    elif size[0] < min(size[1:]) or size[1] != size[2]:
        warnings.append(
            f"The voxel size {shown} nm is odd: sections are seldom thinner than pixels, and "
            f"pixels seldom oblong. It may be in x, y, z order. {step}"
        )
