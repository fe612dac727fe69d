"""`score`, `decode` and `sweep` equal a reference written from the definitions, on anything.

HYDRALV_FUZZ_CASES sets how many cases; 5,000 take half an hour.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from test_sweep import NAMES, slow_decode

from hydralv_tune.numerics.metrics.scores import METRICS, score_labels
from hydralv_tune.numerics.watershed.decoders import CONTOUR, decode
from hydralv_tune.trial.scoring.sweep.sweep import Grid, sweep

CASES = int(os.environ.get("HYDRALV_FUZZ_CASES", "40"))
FIRST = int(os.environ.get("HYDRALV_FUZZ_FIRST", "0"))
TYPES = ("u1", "i1", "<u2", ">i2", "<u4", ">u4", "<i4", "<u8", ">u8", "<i8", ">i8")


def reference(prediction: Any, truth: Any, known: Any) -> dict[str, Any]:
    """Return the figures of nested lists of Python integers, 0 being background, by counting."""
    places = [v for v in np.ndindex(known.shape) if known[v]]
    pairs: dict[tuple[int, int], int] = {}
    a: dict[int, int] = {}
    s: dict[int, int] = {}
    b: dict[int, int] = {}
    for place in places:
        i, j = int(truth[place]), int(prediction[place])
        if i:
            a[i] = a.get(i, 0) + 1
        if j:
            s[j] = s.get(j, 0) + 1
        if i and j:
            b[j] = b.get(j, 0) + 1
            pairs[i, j] = pairs.get((i, j), 0) + 1
    missed = sum(a.values()) - sum(pairs.values())

    def rand(sizes: dict[int, int]) -> float:
        both = sum(n * n for n in pairs.values())
        if not both:
            return 1.0
        share = missed / len(places)
        p = (both + share) / (sum(n * n for n in sizes.values()) + share)
        r = (both + share) / sum(n * n for n in a.values())
        return 1 - 2 * p * r / (p + r)

    iou = {(i, j): n / (a[i] + s[j] - n) for (i, j), n in pairs.items()}
    matched = {ij for ij, v in iou.items() if v > 0.5}
    covers = {ij for ij, n in pairs.items() if 10 * n >= a[ij[0]]}
    backed = {j for (_, j), n in pairs.items() if 10 * n >= s[j]}
    dice = {(i, j): 2 * n / (a[i] + s[j]) for (i, j), n in pairs.items()}
    best = [
        sum(max((d for ij, d in dice.items() if ij[side] == one), default=0.0) for one in sizes)
        / max(len(sizes), 1)
        for side, sizes in ((0, a), (1, s))
    ]
    high = sum(v >= 0.75 for v in iou.values())
    return {
        "adapted_rand_error": rand(b),
        "adapted_rand_error_foreground": rand(s),
        "f1_iou50": 2 * len(matched) / (len(a) + len(s)),
        "f1_iou75": 2 * high / (len(a) + len(s)),
        "ap_iou75": high / (len(a) + len(s) - high),
        "best_dice": min(best),
        "count_bias": (len(s) - len(a)) / len(a),
        "volume_bias": (sum(s.values()) - sum(a.values())) / sum(a.values()),
        "instances_true": len(a),
        "instances_predicted": len(s),
        "matched_iou50": len(matched),
        "missed": sorted(i for i in a if not any(i == k for k, _ in covers)),
        "split": sorted(i for i in a if sum(i == k for k, _ in covers) > 1),
        "merged": sorted(j for j in s if sum(j == k for _, k in covers) > 1),
        "invented": sorted(j for j in s if j not in backed),
    }


def ids_of(rng: np.random.Generator, count: int, kind: np.dtype[Any]) -> list[int]:
    """Return distinct ids that a type can hold, from small to the largest that is one."""
    limits = np.iinfo(kind)
    top = limits.max - (kind.kind == "u" and kind.itemsize >= 4)
    near = [top - k for k in range(count)]
    random = [int(rng.integers(1, top, dtype=np.uint64)) for _ in range(count)]
    small = list(range(1, count + 1))
    ids = list(dict.fromkeys([*(near, random, small)[rng.integers(3)], *small]))[:count]
    return [ids[k] for k in rng.permutation(count)]


def disguised(
    rng: np.random.Generator, labels: np.ndarray, ignored: np.ndarray | None
) -> tuple[np.ndarray, dict[int, int], list[int]]:
    """Return labels under ids of some type with "no label" in places; the ids; what to ignore."""
    kind = np.dtype(TYPES[rng.integers(len(TYPES))])
    ids = ids_of(rng, int(labels.max()), kind)
    found = np.array([0, *ids], kind)[labels]
    ignore: list[int] = []
    if ignored is not None and ignored.any():
        if kind.kind == "i":
            ignore = [int(rng.integers(np.iinfo(kind).min, 0))]
        elif kind.itemsize < 4 or rng.random() < 0.5:
            ignore = [next(k for k in range(np.iinfo(kind).max) if k and k not in ids)]
        found[ignored] = ignore[0] if ignore else np.iinfo(kind).max
    return found, dict(enumerate(ids, start=1)), ignore


def masks(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return none, scattered voxels, a box, or single sections."""
    kind = rng.integers(4)
    if kind == 0:
        return None
    mask = rng.random(shape) < 0.7 if kind == 1 else np.zeros(shape, bool)
    if kind == 2:
        mask[:, 1:, : shape[2] - 1] = True
    if kind == 3:
        mask[rng.integers(2) :: 2] = True
    return mask


@pytest.mark.parametrize("block", range(4))
def test_scores_equal_their_definitions(block: int) -> None:
    for case in range(FIRST + block, FIRST + 3 * CASES, 4):
        rng = np.random.default_rng(case)
        shape = tuple(int(n) for n in rng.integers(1, 6, 3))
        truth = rng.integers(0, rng.integers(2, 7), shape)
        prediction = np.where(rng.random(shape) < 0.6, truth, rng.integers(0, 5, shape))
        mask = masks(rng, shape)
        ignored = rng.random(shape) < 0.2 if rng.random() < 0.5 else None
        known = np.ones(shape, bool) if mask is None else mask.copy()
        if ignored is not None:
            known &= ~ignored
        shown, ids, ignore = disguised(rng, truth, ignored)
        segments, segment_ids, _ = disguised(rng, prediction, None)
        if not (truth[known] > 0).any():
            with pytest.raises(ValueError, match=r"no labelled voxel|no valid voxel"):
                score_labels(prediction=segments, truth=shown, mask=mask, ignore=ignore)
            continue
        scored = score_labels(prediction=segments, truth=shown, mask=mask, ignore=ignore)
        wanted = reference(prediction, truth, known)
        for name in ("missed", "split"):
            wanted[name] = sorted(ids[i] for i in wanted[name])
        for name in ("merged", "invented"):
            wanted[name] = sorted(segment_ids[i] for i in wanted[name])
        for name, value in wanted.items():
            got = getattr(scored, name)
            got = list(got) if isinstance(got, tuple) else got
            assert got == (value if isinstance(value, list) else pytest.approx(value, abs=1e-12)), (
                case, name
            )  # fmt: skip


@pytest.mark.parametrize("block", range(4))
def test_decode_and_sweep_equal_their_definitions(block: int) -> None:
    extra = [name for name, metric in METRICS.items() if metric.stacked]
    for case in range(FIRST + block, FIRST + CASES, 4):
        rng = np.random.default_rng(case)
        shape = (3, *(int(n) for n in rng.integers(2, 5, 3)))
        maps = (rng.integers(0, 5, shape) / 4).astype(np.float32)
        maps[2] = rng.integers(-2, 4, shape[1:]) / 3
        truth = rng.integers(0, 4, shape[1:])
        truth.flat[0] = 1
        mask, scored = masks(rng, shape[1:]), masks(rng, shape[1:])
        for one in (mask, scored):
            if one is not None:
                one.flat[0] = True
        tissue = np.ones(shape[1:], bool) if mask is None else mask
        known = tissue if scored is None else tissue & scored
        shown, _, _ = disguised(rng, truth, None)
        flood = ("support", "volume")[case % 2]
        domain = tissue & ((maps[0] > 0.3) | (maps[2] > 0)) if flood == "support" else tissue
        axes = {f"{name}.{part}": sorted(rng.choice([-0.5, 0.1, 0.3, 0.6, 0.9], 2, replace=False))
                for name in NAMES for part in ("seed", "foreground")}  # fmt: skip
        sizes = {"min_seed_size": [0, 2], "min_instance_size": [0, 3]}
        metric = extra[case % len(extra)]
        objective = type("Objective", (), {"metric": metric})
        table = sweep(
            maps, shown, mask, Grid(CONTOUR, {**axes, **sizes}, {"flood": flood, "floor": 0.3}),
            scored_mask=scored, objective=objective, threads=1,
        ).table  # fmt: skip
        for row in table.sample(4, random_state=case).to_dict("records"):
            pairs = [[row[f"{n}.{part}"] for n in NAMES] for part in ("seed", "foreground")]
            both = (row["min_seed_size"], row["min_instance_size"])
            labels = slow_decode(maps, *pairs, domain, both)
            ours = decode(
                CONTOUR, maps, mask, flood=flood, floor=0.3,
                **dict(zip(("min_seed_size", "min_instance_size"), both, strict=True)),
                **{n: [s, f] for n, s, f in zip(NAMES, *pairs, strict=True)},
            )  # fmt: skip
            names = np.unique(labels[labels > 0])
            np.testing.assert_array_equal(
                ours, np.where(labels > 0, np.searchsorted(names, labels) + 1, 0)
            )
            wanted = reference(labels, truth, known)
            for name in ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50",
                         "instances_predicted", "matched_iou50"):  # fmt: skip
                assert row[name] == pytest.approx(wanted[name], abs=1e-12), (case, name)
            score = score_labels(prediction=ours, truth=truth, mask=known)
            assert row[metric] == pytest.approx(score.metrics[metric], abs=1e-12), (case, metric)
