"""Segment a volume of any size: predict in lanes, decode in blocks, write the labels.

All that is known between two steps lies in a work folder beside the output. A run that was killed
goes on from there and writes the same file; a worker needs the folder and a number.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import psutil
import zarr
from filelock import FileLock, Timeout

from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import InputError, as_input_error
from hydralv_tune.config.files import candidate_from_mapping
from hydralv_tune.data.formats.files import LazyArray, create_array, locate, open_lazy, open_mask
from hydralv_tune.data.formats.location import absolute
from hydralv_tune.data.truth import FilledMask, Gap
from hydralv_tune.data.volumes import Volume, VolumePaths, placement_of
from hydralv_tune.numerics.normalisation import Normalisation
from hydralv_tune.numerics.watershed.decoders import DECODERS, decode
from hydralv_tune.trial.fitted_normalisation import with_normalisation
from hydralv_tune.trial.scoring.prediction import (
    averaged,
    load_members,
    pick_device,
    plan_windows,
    transforms_of,
    window_predictor,
)
from hydralv_tune.trial.scoring.stitching import BACKGROUND, Lane, Span, predicted_sections
from hydralv_tune.trial.whole_volume import decoding
from hydralv_tune.trial.whole_volume.instance_table import InstanceTable, instances_of, voxels_of
from hydralv_tune.trial.whole_volume.lanes import plan_lanes
from hydralv_tune.trial.whole_volume.padded_image import PaddedImage

Array = npt.NDArray[Any]
Size3 = tuple[int, int, int]
Say = Callable[[str, int, int], None]
"""Told the step, how much of it is done, and how much there is."""

PROGRAM_BYTES = 0.9e9
"""What Python, PyTorch and a network's weights take before any voxel is read."""
LEAST_BYTES = 0.2e9
WINDOW_COPIES = 8
"""How many arrays of a network's first width a window is worth while it is predicted."""
TOO_MANY_FOR_UINT16 = 2**16
LABEL_BYTES = 5
"""Of a provisional label while a block is decoded: its block, and whether it is of this one."""
ROWS = 256
"""Written at once along y and x: chunks hold no more."""
A_VOXEL = "a_voxel"
"""Kept beside the table of a block: a voxel of each instance."""
WRITTEN_BYTES = 32
"""What it takes to put a voxel of several blocks together and to compress it."""
COST = ("memory_bytes", "batch", "lanes")
"""What of a plan says in which parts the work is done, not what comes out."""


@dataclass(frozen=True)
class Segmenter:
    """What a volume is segmented with.

    Args:
        checkpoint: Weights and the candidate they were trained as.
        candidate: How windows are predicted; of an ensemble, those of its first network.
        decoder: The name of the decoder.
        arguments: Its thresholds.
        members: Candidate and weight of each network of an ensemble; empty for a single one.
    """

    checkpoint: Path
    candidate: Candidate
    decoder: str
    arguments: Mapping[str, Any]
    members: tuple[tuple[Candidate, float], ...] = ()


@dataclass(frozen=True)
class Segmented:
    """What came out.

    Args:
        out: The labels.
        instances: How many there are.
        blocks: In how many blocks they were decoded.
        table: One row an instance.
    """

    out: Path
    instances: int
    blocks: int
    table: InstanceTable


class Jobs:
    """Runs the jobs of a step one after the other, here. Another one may spread them."""

    workers = 1
    """How many jobs run at once."""
    together = 1
    """How many of them on one machine."""

    def run(
        self, function: Callable[[str, int], Any], folder: str, numbers: Sequence[int]
    ) -> Iterator[int]:
        """Yield the number of each job that is done."""
        for number in numbers:
            function(folder, number)
            yield number


@dataclass(frozen=True)
class Work:
    """The work folder of one segmentation: what is to be done, and what has been done."""

    folder: Path

    @cached_property
    def plan(self) -> dict[str, Any]:
        """Return what `begin` has written."""
        plan: dict[str, Any] = json.loads((self.folder / "plan.json").read_text())
        return plan

    @cached_property
    def candidate(self) -> Candidate:
        """Return the candidate that windows are predicted as."""
        return candidate_from_mapping(self.plan["candidate"], place=str(self.folder), base={})

    @property
    def shape(self) -> Size3:
        """Return (z, y, x) of the volume."""
        z, y, x = self.plan["shape"]
        return z, y, x

    @property
    def lanes(self) -> list[Lane]:
        """Return the lanes of the prediction."""
        return [Lane(tuple(low), tuple(high)) for low, high in self.plan["lanes"]]

    @property
    def probabilities(self) -> zarr.Array[Any]:
        """Return (3, Z, Y, X) float16 on disk."""
        return cast(Any, zarr.open(self.folder / "probabilities.zarr", mode="r+"))

    @property
    def provisional(self) -> zarr.Array[Any]:
        """Return the provisional labels of the domain, (Z, Y, X) uint32 on disk."""
        return cast(Any, zarr.open(self.folder / "domain.zarr", mode="r+"))

    def components(self) -> decoding.Components:
        """Return the components of the domain, read anew: they may fill much memory."""
        with np.load(self.folder / "components.npz") as kept:
            return decoding.Components(**{key: kept[key] for key in kept.files})

    @property
    def has_blocks(self) -> bool:
        """Return whether the blocks have been planned."""
        return (self.folder / "block_boxes.npz").exists()

    def keep_blocks(self, blocks: decoding.Blocks) -> None:
        """Keep the blocks for workers and later runs."""
        boxes = [[(part.start, part.stop) for part in box] for box in blocks.boxes]
        labels = {} if blocks.of_label is None else {"of_label": blocks.of_label}
        _save(
            self.folder / "block_boxes.npz", boxes=np.array(boxes, np.int64).reshape(-1, 3, 2),
            **labels,
        )  # fmt: skip

    @cached_property
    def blocks(self) -> decoding.Blocks:
        """Return the blocks that were planned."""
        with np.load(self.folder / "block_boxes.npz") as kept:
            boxes = [tuple(slice(a, b) for a, b in box) for box in kept["boxes"].tolist()]
            labels = kept["of_label"] if "of_label" in kept.files else None
        return decoding.Blocks(cast(Any, boxes), labels)

    @property
    def equalised(self) -> Path:
        """Return where the sections are that the network sees equalised, (Z, Y, X) uint8, if so."""
        return self.folder / "equalised.raw"

    def measure(self, wanted: bool) -> None:
        """Say for workers and later runs whether instances are measured."""
        if wanted:
            write_atomically(self.folder / "measured", b"")
        else:
            (self.folder / "measured").unlink(missing_ok=True)

    @property
    def measures(self) -> bool:
        """Return whether instances are measured."""
        return (self.folder / "measured").exists()

    def block_file(self, number: int) -> Path:
        """Return where the table of a block is kept; it is there once the block is done."""
        return self.folder / f"block_{number}{'' if self.measures else '_ids'}.npz"

    def block_labels(self, number: int) -> Path:
        """Return where the labels of a block are kept."""
        return self.folder / f"block_{number}.zarr"

    @contextmanager
    def inputs(self) -> Iterator[tuple[LazyArray, LazyArray | FilledMask | None]]:
        """Give image, equalised where the network sees it so, and mask, open for reading."""
        with ExitStack() as stack:
            image: Any = stack.enter_context(open_lazy(self.plan["image"], ndim=3))
            if self.equalised.exists():
                image = np.memmap(self.equalised, np.uint8, "r", shape=self.shape)
            path, gaps = self.plan["mask"], self.plan["gaps"]
            mask = None if path is None else stack.enter_context(open_mask(path, image.shape))
            yield image, FilledMask(mask, gaps) if gaps else mask


@contextmanager
def segmented_volume(
    model: Segmenter, paths: VolumePaths, out: Path, *, memory_gb: float | None,
    gaps: Sequence[Gap] = (), table: bool = True, device: str = "auto", jobs: Jobs | None = None,
    say: Say = lambda step, done, whole: None,
) -> Iterator[Segmented]:  # fmt: skip
    """Write the instances of a volume, and give what there is of them.

    What was computed is kept until the block that uses it ends, so that no work is lost where
    that is stopped or fails.

    Args:
        model: Weights and thresholds.
        paths: Image and mask.
        out: Where the labels go, (Z, Y, X): uint16 where the ids fit, uint32 otherwise.
        memory_gb: What a process may take at its peak, the program itself included. None is what
            the work that goes on was begun with, and else half of what is free here, divided
            among the jobs that run on one machine.
        gaps: Sections that the mask leaves out and that are tissue all the same.
        table: Whether instances are measured; otherwise their table holds the ids alone.
        device: As for `pick_device`.
        jobs: Who runs the jobs of a step.
        say: Is told how far each step is.

    Raises:
        VolumeError: A file cannot be read or written, or the shapes differ.
        InputError: A connected region does not fit into the memory, or another process segments
            to the same output.
        TrialFailed: The network gives values that are not finite.
    """
    with _alone(out):
        jobs = jobs or Jobs()
        free = psutil.virtual_memory().available
        wanted = memory_gb or max(free / 2e9 / jobs.together, 1.0)
        spread = max((wanted * 1e9 - PROGRAM_BYTES), LEAST_BYTES)
        folder = work_folder(out)
        work = _begin(
            model, paths, folder, memory_bytes=spread, gaps=gaps, device=device,
            workers=jobs.workers, as_begun=memory_gb is None,
        )  # fmt: skip
        if memory_gb is None:
            spread = work.plan["memory_bytes"]
        if model.members:
            _predict_members(work, model, paths, jobs, say)
        else:
            _predict(work, jobs, say)
        work.measure(table)
        blocks = _plan_blocks(work, spread, say)
        missing = [n for n in range(len(blocks)) if not work.block_file(n).exists()]
        done = len(blocks) - len(missing)
        for _ in jobs.run(decode_one, str(work.folder), missing):
            done += 1
            say("decode", done, len(blocks))
        rows = _write_labels(work, out, blocks, say)
        yield Segmented(out=out, instances=len(rows), blocks=len(blocks), table=rows)
        shutil.rmtree(work.folder)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other processes from the work folder of an output, where the file system has locks.

    Raises:
        InputError: Another process segments to the same output.
    """
    lock = FileLock(work_folder(out).with_suffix(".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{out}: another process is segmenting to it. Wait until it ends, or give another "
            "--out."
        ) from None
    except (OSError, NotImplementedError):  # a file system without locks
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def work_folder(out: Path) -> Path:
    """Return the folder that a segmentation keeps its state in while it is under way."""
    location = locate(out)
    name = location.path.name + (
        f".{location.dataset.replace('/', '_')}" if location.dataset else ""
    )
    return location.path.with_name(f"{name}.work")


def _begin(
    model: Segmenter, paths: VolumePaths, folder: Path, *, memory_bytes: float, gaps: Sequence[Gap],
    device: str, workers: int, member: int = 0, as_begun: bool = False,
) -> Work:  # fmt: skip
    """Return the work folder: an earlier one of the very same work, or a fresh one.

    Earlier work goes on in the parts that it was begun in, with more memory or workers too.

    Args:
        model: As for `segmented_volume`.
        paths: As for `segmented_volume`.
        folder: The work folder.
        memory_bytes: What a job may take.
        gaps: As for `segmented_volume`.
        device: As for `segmented_volume`.
        workers: How many jobs run at once.
        member: Which network of an ensemble predicts.
        as_begun: Whether earlier work goes on whatever memory it was begun with.
    """
    work = Work(folder)
    with open_lazy(paths.image, ndim=3) as image:
        shape = image.shape
    if paths.mask is not None:
        with open_mask(paths.mask, shape) as mask:
            if mask.shape != shape:
                raise InputError(
                    f"{paths.mask}: the mask has shape {mask.shape}, but the image {paths.image} "
                    f"has {shape}; both must be equal. Give the mask of this very volume."
                )
    size, origin = placement_of(paths)
    with as_input_error(paths.image):
        windows = plan_windows(shape, model.candidate)
    lanes = plan_lanes(shape, windows, memory_bytes=0.4 * memory_bytes, least=workers)
    plan = {
        "image": absolute(paths.image),
        "mask": None if paths.mask is None else absolute(paths.mask),
        "gaps": [list(gap) for gap in gaps],
        "shape": list(shape),
        "voxel_size_nm": size,
        "origin_nm": origin,
        "files": [_state_of(p) for p in (paths.image, paths.mask) if p is not None],
        "checkpoint": str(model.checkpoint.absolute()),
        "weights": sha256(model.checkpoint.read_bytes()).hexdigest(),
        "member": member,
        "candidate": model.candidate.as_mapping(),
        "decoder": model.decoder,
        "arguments": dict(model.arguments),
        "device": device,
        "batch": _batch(model.candidate, memory_bytes),
        "memory_bytes": memory_bytes,
        "lanes": [[list(lane.low), list(lane.high)] for lane in lanes],
    }
    text = json.dumps(plan, indent=1, default=list)
    if (work.folder / "plan.json").exists():
        begun, asked = dict(work.plan), json.loads(text)
        enough = as_begun or memory_bytes >= begun["memory_bytes"]
        if enough and {**begun, **{key: asked[key] for key in COST}} == asked:
            return work
    work = Work(work.folder)
    empty = work.folder.is_dir() and not any(work.folder.iterdir())
    if work.folder.exists() and not (empty or (work.folder / "probabilities.zarr").exists()):
        raise InputError(
            f"{work.folder}: is of no segmentation, and would be lost. Move it away, or give "
            "another --out."
        )
    shutil.rmtree(work.folder, ignore_errors=True)
    work.folder.mkdir(parents=True)
    # No chunk lies in two lanes, which may be written at once.
    sides = zip(range(3), shape, (decoding.SLAB, 256, 256), strict=True)
    block = (3, *(_chunk({lane.low[a] for lane in lanes}, min(n, most)) for a, n, most in sides))
    zarr.create_array(
        work.folder / "probabilities.zarr", shape=(3, *shape), chunks=block, dtype="float16",
        compressors=[zarr.codecs.BloscCodec(cname="lz4", clevel=1)], fill_value=0,
    )  # fmt: skip
    volume = Volume(paths.name, cast(Any, None))
    with open_lazy(paths.image, ndim=3) as image:
        volume = with_normalisation(
            replace(volume, image=cast(Any, image)), model.candidate.data, work.equalised
        )
    assert volume.normalisation is not None
    _save(work.folder / "normalisation.npz", **asdict(volume.normalisation))
    write_atomically(work.folder / "plan.json", text.encode())
    return work


def _chunk(starts: set[int], most: int) -> int:
    """Return the side of chunks of which each lies in one lane, `most` if it can be.

    Args:
        starts: Where lanes begin along the axis.
        most: The largest side.
    """
    step = math.gcd(*starts)
    return most if step == 0 else step if step <= most else math.gcd(step, most)


def _state_of(path: str) -> list[Any]:
    """Return what changes when a file does."""
    file = locate(path).path
    if not file.exists():
        return [path]
    files = sorted(p for p in file.rglob("*") if p.is_file()) if file.is_dir() else [file]
    stats = [p.stat() for p in files]
    return [
        str(file),
        sum(s.st_size for s in stats),
        max((s.st_mtime_ns for s in stats), default=0),
    ]


def _batch(candidate: Candidate, memory_bytes: float) -> int:
    """Return how many windows are predicted at once: as `predict` does, if the memory allows."""
    window = candidate.inference.sliding_window
    size = window.window_size or candidate.data.patch_size
    wanted = window.sw_batch_size or max(candidate.system.inference.batch_size, 4)
    width = candidate.model.filters[0] if candidate.model.filters else 32
    one = math.prod(size) * 4 * width * WINDOW_COPIES
    return max(1, min(wanted, int(0.5 * memory_bytes / one)))


def _save(path: Path, **arrays: Array) -> None:
    """Write arrays, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **cast(Any, arrays))
    write_atomically(path, buffer.getvalue())


def _predict(work: Work, jobs: Jobs, say: Say) -> None:
    """Run the prediction of every lane that is not done."""
    lanes = work.lanes
    depth = sum(lane.high[0] - lane.low[0] for lane in lanes)
    missing = [n for n, lane in enumerate(lanes) if _reached(work, n) < lane.high[0]]
    say("predict", sum(_reached(work, n) - lane.low[0] for n, lane in enumerate(lanes)), depth)
    for _ in jobs.run(predict_one, str(work.folder), missing):
        say("predict", sum(_reached(work, n) - lane.low[0] for n, lane in enumerate(lanes)), depth)


def _predict_members(
    work: Work, model: Segmenter, paths: VolumePaths, jobs: Jobs, say: Say
) -> None:
    """Predict with each network of an ensemble in a work folder of its own, and average them."""
    done = work.folder / "averaged"
    if done.exists():
        return
    plan, parts = work.plan, []
    for number, (candidate, _) in enumerate(model.members):
        part = _begin(
            replace(model, candidate=candidate, members=()), paths,
            work.folder / f"member_{number}", memory_bytes=plan["memory_bytes"],
            gaps=plan["gaps"], device=plan["device"], workers=jobs.workers, member=number,
            as_begun=True,
        )  # fmt: skip
        _predict(part, jobs, say)
        parts.append(part)
    shares = [share for _, share in model.members]
    target, sources = work.probabilities, [part.probabilities for part in parts]
    memory = plan["memory_bytes"] / (len(parts) + 1)
    for slab in decoding.sections_of(work.shape, memory_bytes=memory):
        target[:, slab] = averaged([np.asarray(maps[:, slab]) for maps in sources], shares)
        say("average", slab.stop, work.shape[0])
    write_atomically(done, b"")
    for part in parts:
        shutil.rmtree(part.folder)


def _reached(work: Work, number: int) -> int:
    """Return the section that a lane has reached."""
    try:
        return int((work.folder / f"lane_{number}").read_text())
    except FileNotFoundError:
        return work.lanes[number].low[0]


def predict_one(folder: str, number: int) -> None:
    """Predict one lane, from the section that it has reached, into the work folder."""
    work = Work(Path(folder))
    plan, lane, candidate = work.plan, work.lanes[number], work.candidate
    device = pick_device(plan["device"])
    network = load_members(plan["checkpoint"], device=device, only=plan["member"])[0].network
    windows = plan_windows(work.shape, candidate)
    with np.load(work.folder / "normalisation.npz") as kept:
        fitted = Normalisation(**{key: kept[key] for key in kept.files})
    target = work.probabilities
    hidden = candidate.inference.test_time_augmentation.apply_mask
    with work.inputs() as (image, mask):
        padded = PaddedImage(cast(Any, image), windows, candidate, fitted)
        steps = predicted_sections(
            padded, candidate, windows, lane,
            predictor=window_predictor(network, candidate, transforms_of(candidate), device),
            wanted=lambda z, y, x: _mask_box(mask, work.shape, windows.before, (z, y, x)),
            batch=plan["batch"], device=device, progress=lambda windows_done: None,
            start=_reached(work, number),
        )  # fmt: skip
        for first, values in steps:
            end = first + values.shape[1]
            box = (
                slice(first, end),
                *(slice(a, b) for a, b in zip(lane.low[1:], lane.high[1:], strict=True)),
            )
            if mask is not None and hidden:
                values[:, ~(mask[box] > 0)] = np.array(BACKGROUND, np.float16)[:, None]
            target[(slice(None), *box)] = values
            write_atomically(work.folder / f"lane_{number}", str(end).encode())


def _mask_box(
    mask: LazyArray | FilledMask | None, shape: Size3, before: Size3, spans: tuple[Span, Span, Span]
) -> Array | None:
    """Return the mask in a box of the padded volume; padding is outside of it."""
    if mask is None:
        return None
    result = np.zeros([end - first for first, end in spans], bool)
    inner, outer = [], []
    for (first, end), side, shift in zip(spans, shape, before, strict=True):
        low, high = max(first - shift, 0), min(end - shift, side)
        if low >= high:
            return result
        inner.append(slice(low, high))
        outer.append(slice(low + shift - first, high + shift - first))
    result[tuple(outer)] = mask[tuple(inner)] > 0
    return result


def _plan_blocks(work: Work, memory_bytes: float, say: Say) -> decoding.Blocks:
    """Return the blocks to decode, the volume as one where it fits; they are kept on disk."""
    if work.has_blocks:
        return work.blocks
    shape, name = work.shape, work.plan["decoder"]
    place_bytes = decoding.PLACE_BYTES
    if not DECODERS[name].by_section:
        place_bytes += decoding.MAP_BYTES
    domain = decoding.domain_of(name, work.plan["arguments"])
    needed = math.prod(shape) * (place_bytes + decoding.NODE_BYTES)
    if needed <= memory_bytes:
        whole = cast(Any, tuple(slice(0, side) for side in shape))
        blocks = decoding.Blocks([whole])
    elif domain is None:
        raise InputError(
            f"--memory-gb: the decoder {name} can only decode a volume at once, which takes "
            f"{(needed + PROGRAM_BYTES) / 1e9:.1f} GB here. Allow that much, or crop the volume."
        )
    else:
        if (work.folder / "components.npz").exists():
            found = work.components()
        else:
            found = _find_components(work, domain, memory_bytes, say)
        kept = LABEL_BYTES * len(found.roots)
        kept += decoding.READ_BYTES * decoding.SLAB * math.prod(shape[1:])
        blocks = decoding.plan_blocks(
            shape, found, memory_bytes=memory_bytes, kept_bytes=kept, place_bytes=place_bytes
        )
    work.keep_blocks(blocks)
    return blocks


def _find_components(
    work: Work, domain: decoding.Domain, memory_bytes: float, say: Say
) -> decoding.Components:
    """Label the domain on disk, and keep and return its components."""
    shape, maps = work.shape, work.probabilities
    zarr.create_array(
        work.folder / "domain.zarr", shape=shape, chunks=(16, *(min(s, 256) for s in shape[1:])),
        dtype="uint32", compressors=[zarr.codecs.BloscCodec(cname="lz4", clevel=1)],
        overwrite=True,
    )  # fmt: skip
    kept = work.provisional
    nodes = decoding.nodes_of(work.plan["decoder"], work.plan["arguments"])
    tiles = [
        (slice(None), slice(y, y + maps.chunks[2]), slice(x, x + maps.chunks[3]))
        for y in range(0, shape[1], maps.chunks[2])
        for x in range(0, shape[2], maps.chunks[3])
    ]
    with work.inputs() as (_, mask):

        def at(slab: slice) -> tuple[Array, Array]:
            say("find regions", slab.start, shape[0])
            valid = None if mask is None else mask[slab] > 0
            inside, counted = np.zeros((2, slab.stop - slab.start, *shape[1:]), bool)
            for tile in tiles:
                here = None if valid is None else valid[tile]
                if here is None or here.any():
                    values = np.asarray(maps[(slice(None), slab, *tile[1:])])
                    inside[tile] = domain(values, here)
                    counted[tile] = inside[tile] if nodes is None else nodes(values, here)
            return inside, counted

        def write(slab: slice, labels: Array) -> None:
            kept[slab] = labels

        slabs = list(decoding.sections_of(shape, memory_bytes=memory_bytes))
        found = decoding.label_components(slabs, at, write)
    _save(work.folder / "components.npz", **asdict(found))
    return found


def decode_one(folder: str, number: int) -> None:
    """Decode one block into the work folder."""
    work = Work(Path(folder))
    plan, blocks = work.plan, work.blocks
    box = blocks.boxes[number]
    name, arguments = plan["decoder"], plan["arguments"]
    stored = decoding.MapsOnDisk(work.probabilities, box)
    maps: Any = stored if DECODERS[name].by_section else np.asarray(stored)
    with work.inputs() as (_, mask):
        needed = mask is not None and (work.measures or blocks.of_label is None)
        valid = cast(Any, mask)[box] > 0 if needed else None
    with as_input_error(name):
        if blocks.of_label is not None:
            labels = decoding.decode_block(blocks, number, maps, work.provisional, name, arguments)
        elif valid is not None and not valid.any():
            labels = np.zeros(valid.shape, np.int32)
        else:
            labels = decode(name, maps, valid, **arguments)
    rows = {"id": np.arange(1, int(labels.max()) + 1)}
    if work.measures:
        first = [part.start for part in box]
        rows = instances_of(
            labels, lambda z: stored[slice(0, 1), z][0], valid, first=first, shape=work.shape,
            voxel_size_nm=plan["voxel_size_nm"], origin_nm=plan["origin_nm"],
        )  # fmt: skip
        rows[A_VOXEL] = voxels_of(rows, labels, first)
    kept = zarr.create_array(
        work.block_labels(number), shape=labels.shape, dtype=labels.dtype, overwrite=True,
        chunks=(decoding.SLAB, *(min(side, 256) for side in labels.shape[1:])),
        compressors=[zarr.codecs.BloscCodec(cname="lz4", clevel=1)],
    )  # fmt: skip
    for z in range(0, len(labels), decoding.SLAB):
        kept[z : z + decoding.SLAB] = labels[z : z + decoding.SLAB]
    _save(work.block_file(number), **rows)


def _write_labels(work: Work, out: Path, blocks: decoding.Blocks, say: Say) -> InstanceTable:
    """Write the instances of all blocks, numbered through, and return their table."""
    columns: list[dict[str, Array]] = []
    voxels: list[Array] = [np.zeros((0, 3), np.int64)]
    firsts = [0]
    if not len(blocks):  # the domain is empty
        nothing = np.zeros((1, 1, 1), np.int32)
        columns.append(
            instances_of(
                nothing, nothing.__getitem__, None, first=(0, 0, 0), shape=work.shape,
                voxel_size_nm=work.plan["voxel_size_nm"], origin_nm=work.plan["origin_nm"],
            )
        )  # fmt: skip
        firsts.append(0)
    for number in range(len(blocks)):
        with np.load(work.block_file(number)) as kept:
            columns.append({key: kept[key] for key in kept.files if key != A_VOXEL})
            if work.measures:
                voxels.append(kept[A_VOXEL])
        firsts.append(firsts[-1] + len(columns[-1]["id"]))
    total = firsts[-1]
    dtype = np.uint16 if total < TOO_MANY_FOR_UINT16 else np.uint32
    shape, plan = work.shape, work.plan
    stored: list[Any] = [zarr.open(work.block_labels(n), mode="r") for n in range(len(blocks))]
    depth = decoding.SLAB
    rows = int(plan["memory_bytes"] / (WRITTEN_BYTES * depth * shape[2])) // ROWS * ROWS or ROWS
    strips = [
        (slice(z, min(z + depth, shape[0])), slice(y, min(y + rows, shape[1])), slice(0, shape[2]))
        for z in range(0, shape[0], depth)
        for y in range(0, shape[1], rows)
    ]
    with create_array(
        out, shape, dtype, voxel_size_nm=plan["voxel_size_nm"], origin_nm=plan["origin_nm"]
    ) as target:
        for strip in strips:
            labels = np.zeros([part.stop - part.start for part in strip], dtype)
            for number, box in enumerate(blocks.boxes):
                _put(labels, strip, stored[number], box, firsts[number])
            for y in range(0, labels.shape[1], ROWS):
                for x in range(0, labels.shape[2], ROWS):
                    part = labels[:, y : y + ROWS, x : x + ROWS]
                    if part.any():  # what is never written is 0
                        low = strip[1].start + y
                        target[strip[0], low : low + part.shape[1], x : x + part.shape[2]] = part
            say("write", strip[0].stop, shape[0])
    table = InstanceTable.joined(columns, firsts)
    if plan["mask"] is None or not work.measures:
        return table
    return InstanceTable({**table.columns, "mask_component": _hosts(work, np.concatenate(voxels))})


def _put(labels: Array, strip: decoding.Box, stored: Any, box: decoding.Box, first: int) -> None:
    """Write the instances of a block into a part of the volume.

    Args:
        labels: Of the part, (z, y, x).
        strip: Where the part lies in the volume.
        stored: The labels of the block on disk, from 1.
        box: Where the block lies.
        first: What is added to its ids.
    """
    low = [max(a.start, b.start) for a, b in zip(strip, box, strict=True)]
    high = [min(a.stop, b.stop) for a, b in zip(strip, box, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return
    spans = list(zip(low, high, strict=True))
    inner = tuple(slice(a - o.start, b - o.start) for (a, b), o in zip(spans, box, strict=True))
    outer = tuple(slice(a - o.start, b - o.start) for (a, b), o in zip(spans, strip, strict=True))
    part = stored[inner]
    np.copyto(labels[outer], (part + first).astype(labels.dtype), where=part > 0)


def _hosts(work: Work, voxels: Array) -> Array:
    """Return the 26-connected component of the mask that holds each instance, counted from 1.

    Args:
        work: Of the segmentation.
        voxels: (instances, 3), a voxel of each.
    """
    found = np.zeros(len(voxels), np.int64)
    with work.inputs() as (_, mask):
        assert mask is not None
        inside_of = mask

        def at(slab: slice) -> tuple[Array, Array]:
            inside = inside_of[slab] > 0
            return inside, inside

        def note(slab: slice, provisional: Array) -> None:
            here = np.flatnonzero((voxels[:, 0] >= slab.start) & (voxels[:, 0] < slab.stop))
            z, y, x = voxels[here].T
            found[here] = provisional[z - slab.start, y, x]

        slabs = list(decoding.sections_of(work.shape, memory_bytes=work.plan["memory_bytes"]))
        components = decoding.label_components(slabs, at, note)
    return np.asarray(components.roots[found])
