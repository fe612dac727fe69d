"""Segmentation in lanes and blocks gives what predicting and decoding at once gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ray_cluster import ENVIRONMENT, ray_cluster
from scipy import ndimage

from hydralv_tune.artifacts.records import FORMAT, FORMAT_VERSION
from hydralv_tune.cli.main import exit_code
from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import InputError, VolumeError
from hydralv_tune.config.files import candidate_from_mapping
from hydralv_tune.data.formats.files import open_lazy
from hydralv_tune.data.volumes import VolumePaths, read_array, read_volume, write_array
from hydralv_tune.numerics.metrics.contingency import contingency_table, of_one_volume
from hydralv_tune.numerics.metrics.scores import score, score_labels
from hydralv_tune.numerics.phantom.degradation import degraded_probabilities
from hydralv_tune.numerics.phantom.volume import Phantom, make_phantom
from hydralv_tune.numerics.watershed.decoders import decode
from hydralv_tune.numerics.watershed.flood import regions
from hydralv_tune.results.segmentation import gaps_of_tissue
from hydralv_tune.trial.fitted_normalisation import fit_image
from hydralv_tune.trial.scoring.prediction import (
    network_of,
    plan_windows,
    predict,
    transforms_of,
    window_predictor,
)
from hydralv_tune.trial.scoring.stitching import Lane, predicted_sections
from hydralv_tune.trial.whole_volume import decoding, segmentation
from hydralv_tune.trial.whole_volume.lanes import plan_lanes
from hydralv_tune.trial.whole_volume.padded_image import PaddedImage
from hydralv_tune.trial.whole_volume.segmentation import (
    Segmented,
    Segmenter,
    segmented_volume,
)

CONTOUR = "decode_instance_binary_contour_distance"
DISTANCE = "decode_instance_watershed_distance"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    """Return a small volume with touching vesicles."""
    return make_phantom((20, 72, 72), instances=5, seed=5)


def segment_volume(*words: Any, **options: Any) -> Segmented:
    """Return what a segmentation gives, of which nothing but the labels is kept."""
    with segmented_volume(*words, **options) as found:
        return found


def candidate_of(**changes: Any) -> Candidate:
    """Return a small candidate with some blocks changed."""
    mapping: dict[str, Any] = {
        "model": {"architecture": "rsunet", "filters": [2, 4], "deep_supervision": False},
        "data": {"patch_size": [8, 32, 32], "pad_size": [2, 6, 5], "pad_mode": "reflect"},
        "inference": {
            "sliding_window": {"window_size": [8, 32, 32], "overlap": 0.5, "blending": "gaussian"},
            "test_time_augmentation": {"enabled": False},
        },
    }
    for path, value in changes.items():
        block = mapping
        *above, key = path.split("__")
        for name in above:
            block = block.setdefault(name, {})
        block[key] = value
    return candidate_from_mapping(mapping, place="test")


def in_lanes(
    image: np.ndarray, candidate: Candidate, lanes: list[Lane], mask: np.ndarray | None = None
) -> np.ndarray:
    """Return the probabilities of all lanes together."""
    torch.manual_seed(0)
    network = network_of(candidate).eval()
    windows = plan_windows(image.shape, candidate)
    padded = PaddedImage(image, windows, candidate, fit_image(image, candidate.data)[1])
    result = np.full((3, *image.shape), np.nan, np.float16)
    for lane in lanes:
        steps = predicted_sections(
            padded, candidate, windows, lane,
            predictor=window_predictor(network, candidate, transforms_of(candidate), CPU),
            wanted=lambda z, y, x: segmentation._mask_box(
                mask, image.shape, windows.before, (z, y, x)
            ),
            batch=4, device=CPU, progress=lambda done: None,
        )  # fmt: skip
        for first, values in steps:
            box = np.s_[first : first + values.shape[1], lane.low[1] : lane.high[1]]
            result[:, box[0], box[1], lane.low[2] : lane.high[2]] = values
    return result


def at_once(image: np.ndarray, candidate: Candidate, mask: np.ndarray | None = None) -> np.ndarray:
    """Return the probabilities that `predict` gives."""
    torch.manual_seed(0)
    return predict(network_of(candidate).eval(), image, candidate, mask=mask)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__pad_mode": "constant"},
        {"data__pad_mode": "replicate"},
        {"data__pad_size": [0, 0, 0]},
        {"data__image_transform": {"normalize": "z_section"}},
        {"inference__sliding_window__blending": "constant"},
        {"inference__sliding_window__window_size": [32, 32, 32]},
        {"inference__sliding_window__padding_mode": "reflect",
         "inference__sliding_window__window_size": [48, 96, 96]},
        {"inference__test_time_augmentation": {"enabled": True, "flip_axes": [[2]],
                                               "rotation90_axes": None}},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)  # fmt: skip
def test_lanes_give_what_predicting_at_once_gives(phantom: Phantom, changes: Any) -> None:
    candidate, image = candidate_of(**changes), phantom.image[:, :, :40]
    z, y, x = image.shape
    whole = at_once(image, candidate)
    one = in_lanes(image, candidate, [Lane((0, 0, 0), (z, y, x))])
    np.testing.assert_array_equal(one, whole)
    cut = [Lane((a, b, 0), (c, d, x)) for a, c in ((0, 16), (16, z)) for b, d in ((0, 33), (33, y))]
    parts = in_lanes(image, candidate, cut)
    np.testing.assert_allclose(parts.astype(float), whole.astype(float), atol=1e-3)


def test_windows_outside_the_mask_are_not_computed_and_change_nothing_inside(
    phantom: Phantom,
) -> None:
    candidate = candidate_of()
    mask = np.zeros(phantom.image.shape, bool)
    mask[2:9, 5:30, 40:70] = True
    z, y, x = phantom.image.shape
    found = in_lanes(phantom.image, candidate, [Lane((0, 0, 0), (z, y, x))], mask)
    whole = at_once(phantom.image, candidate, mask)
    np.testing.assert_allclose(found.astype(float), whole.astype(float), atol=1e-3)
    assert (found[2, -1] == -1).all()


def test_lanes_cover_a_volume_once_and_keep_to_the_memory() -> None:
    candidate = candidate_of()
    shape = (50, 300, 700)
    windows = plan_windows(shape, candidate)
    covered = np.zeros(shape, int)
    lanes = plan_lanes(shape, windows, memory_bytes=2e6, least=3)
    for lane in lanes:
        covered[tuple(slice(a, b) for a, b in zip(lane.low, lane.high, strict=True))] += 1
    assert (covered == 1).all()
    assert len(lanes) > 3
    assert len(plan_lanes(shape, windows, memory_bytes=1e9)) == 1


def same_instances(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two label volumes hold the same instances, ids apart."""
    pairs = np.unique(np.stack([one.ravel(), other.ravel()], 1), axis=0)
    return len(pairs) == len(np.unique(one)) == len(np.unique(other)) and (
        ((pairs == 0).sum(1) != 1).all()
    )


def cost(components: decoding.Components, shape: Any, chosen: Any) -> float:
    """Return the bytes that a block of some components takes."""
    boxes = components.boxes[chosen]
    low = np.maximum(boxes[:, :, 0].min(0) - 1, 0)
    places = np.prod(np.minimum(boxes[:, :, 1].max(0) + 1, shape) - low)
    nodes = components.nodes[chosen].sum()
    return float(places * decoding.PLACE_BYTES + nodes * decoding.NODE_BYTES)


def in_blocks(
    maps: np.ndarray, mask: np.ndarray | None, name: str, arguments: dict[str, Any], most: float,
    depth: int, share: float | None = None,
) -> tuple[np.ndarray, int]:  # fmt: skip
    """Return the instances of all blocks, and the number of blocks.

    Blocks take so many voxels as `most`; or, from 0 to 1, as the share says between what the
    costliest region alone takes and what all of them take at once.
    """
    shape = maps.shape[1:]
    provisional = np.zeros(shape, np.uint32)
    domain, nodes = decoding.domain_of(name, arguments), decoding.nodes_of(name, arguments)
    assert domain is not None

    def domain_at(slab: slice) -> tuple[np.ndarray, np.ndarray]:
        here = None if mask is None else mask[slab]
        inside = domain(maps[:, slab], here)
        return inside, inside if nodes is None else nodes(maps[:, slab], here)

    slabs = [slice(z, min(z + depth, shape[0])) for z in range(0, shape[0], depth)]
    components = decoding.label_components(
        slabs, domain_at,
        provisional.__setitem__,
    )  # fmt: skip
    whole = domain(maps, mask)
    expected, count = ndimage.label(whole, structure=np.ones((3, 3, 3)))
    assert same_instances(components.roots[provisional], expected)
    assert len(components) == count
    result = np.zeros(shape, np.int64)
    memory = most * decoding.PLACE_BYTES
    if share is not None:
        every = np.arange(1, len(components) + 1)
        least, all_of_them = (
            max(cost(components, shape, [one]) for one in every),
            cost(components, shape, every),
        )
        memory = 1.0001 * least * (all_of_them / least) ** share
    blocks = decoding.plan_blocks(shape, components, memory_bytes=memory)
    assert blocks.of_label is not None
    assert set(blocks.of_label[1:]) - {0} == set(range(1, len(blocks) + 1))
    np.testing.assert_array_equal(blocks.of_label > 0, components.nodes[components.roots] > 0)
    for number, box in enumerate(blocks.boxes):
        labels = decoding.decode_block(
            blocks, number, decoding.MapsOnDisk(maps, box), provisional, name, arguments,
        )  # fmt: skip
        part = result[box]
        part[labels > 0] = labels[labels > 0] + result.max()
    return result, len(blocks)


@pytest.mark.parametrize("flood", ["contour", "distance"])
def test_the_domain_of_halves_is_that_of_doubles(flood: str) -> None:
    rng = np.random.default_rng(0)
    maps = rng.uniform(-1, 1, (3, 4, 64, 64)).astype(np.float16)
    maps[:2] = np.abs(maps[:2])
    maps[:, 0, 0, :4] = np.array([0.0, -0.0, 6e-8, 1.0], np.float16)
    exact = [float(value) for value in rng.choice(maps[0].ravel(), 20)]
    for threshold in [*exact, *rng.uniform(0, 1, 20), 0.0, 1.0, 1e-9, 2.0, -0.5]:
        if flood == "contour":
            name = "decode_instance_binary_contour_distance"
            domain = decoding.domain_of(name, {"flood": "support", "floor": threshold})
        else:
            name = "decode_instance_watershed_distance"
            chosen = [max(threshold, 0.0), threshold]
            domain = decoding.domain_of(name, {"distance_threshold": chosen})
        assert domain is not None
        np.testing.assert_array_equal(
            domain(maps, None), domain(maps.astype(np.float64), None), err_msg=str(threshold)
        )


@pytest.mark.parametrize("share", [0, 0.02, 0.08, 0.2, 0.5, 0.95, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 30, 31), (9, 20, 20)])
def test_regions_are_those_of_scipy(shape: tuple[int, ...], share: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        inside = rng.random(shape) < share
        counted = inside & (rng.random(shape) < 0.5)
        labels, boxes, sizes = regions(inside, counted)
        expected, count = ndimage.label(inside, structure=np.ones((3, 3, 3)))
        np.testing.assert_array_equal(labels, expected)
        spans = [[(p.start, p.stop) for p in box] for box in ndimage.find_objects(expected)]
        np.testing.assert_array_equal(boxes, np.array(spans, int).reshape(count, 3, 2))
        for column, which in enumerate((inside, counted)):
            one = np.bincount(expected[which], minlength=count + 1)[1:]
            np.testing.assert_array_equal(sizes[:, column], one)


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (CONTOUR, {"flood": "support", "floor": 0.3, "min_instance_size": 20}),
        (
            CONTOUR,
            {
                "flood": "support",
                "floor": 0.5,
                "min_seed_size": 1,
                "distance_threshold": [0.2, -0.9],
            },
        ),
        (CONTOUR, {"flood": "volume"}),
        (CONTOUR, {"floor": 0.3, "split_components": True, "min_instance_size": 8}),
        (DISTANCE, {"distance_threshold": [0.4, 0.0]}),
        (DISTANCE, {"distance_threshold": [0.1, 0.3], "min_instance_size": 5}),
    ],
)
def test_blocks_give_the_instances_of_decoding_at_once(
    phantom: Phantom, name: str, arguments: dict[str, Any], masked: bool
) -> None:
    maps = degraded_probabilities(phantom.label, seed=1, noise=0.05)
    mask = None
    if masked:
        mask = ndimage.binary_dilation(phantom.label > 0, iterations=1)
        assert ndimage.label(mask, structure=np.ones((3, 3, 3)))[1] > 1
    whole = decode(name, maps, mask, **arguments)
    assert whole.max() > 3
    counts = []
    for most, depth in ((1e9, 20), (50000, 5), (30000, 1)):
        if arguments.get("flood") == "volume" and not masked and most < 1e9:
            continue
        found, blocks = in_blocks(maps, mask, name, arguments, most, depth)
        assert same_instances(found, whole), (most, depth)
        counts.append(blocks)
    assert counts[0] == 1
    assert len(counts) == 1 or counts[-1] > 1


@pytest.mark.parametrize(
    ("name", "flood"),
    [
        ("phantom", "support"), ("phantom", "volume"), ("hydra-11-5", "volume"),
        ("vnc-mito", "support"),
        *(pytest.param(*row, marks=pytest.mark.slow)
          for row in (("hydra-11-5", "support"), ("vnc-mito", "volume"))),
    ],
)  # fmt: skip
def test_five_block_sizes_give_the_instances_of_three_volumes(
    phantom: Phantom, request: pytest.FixtureRequest, name: str, flood: str
) -> None:
    """Real labels, with probabilities as a network might give them."""
    if name == "phantom":
        label = phantom.label
    else:
        path = request.getfixturevalue("shared_data") / name / "label.h5"
        with open_lazy(path, ndim=3) as labels:
            crowded = {"hydra-11-5": (20, 360, 240), "vnc-mito": (0, 300, 360)}
            z, y, x = crowded[name]
            label = labels[z : z + 20, y : y + 120, x : x + 120].astype(np.int32)
    assert len(np.unique(label)) > 5
    maps = degraded_probabilities(label, seed=2, noise=0.05)
    # Where the flood runs everywhere, the mask alone makes regions: what lies around instances.
    mask = ndimage.binary_dilation(label > 0, iterations=1) if flood == "volume" else None
    arguments = {"flood": flood, "floor": 0.3}
    whole = decode(CONTOUR, maps, mask, **arguments)
    assert whole.max() > 3
    counts = []
    for share in np.linspace(0, 1, 5):
        found, blocks = in_blocks(maps, mask, CONTOUR, arguments, 0, 7, share=float(share))
        assert same_instances(found, whole), share
        counts.append(blocks)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 3
    assert counts[-1] == 1


def test_a_flood_of_the_whole_volume_is_refused_where_it_does_not_fit(phantom: Phantom) -> None:
    maps = degraded_probabilities(phantom.label, seed=1, noise=0.05)
    with pytest.raises(InputError, match=r"floor=0\.3") as caught:
        in_blocks(maps, None, CONTOUR, {"flood": "volume"}, 10000, 4)
    assert f"{phantom.label.size:,} voxels" in str(caught.value)


@pytest.fixture
def model(tmp_path: Path, phantom: Phantom) -> Segmenter:
    """Return a network with random weights, as a checkpoint, and thresholds that find something."""
    candidate = candidate_of()
    torch.manual_seed(3)
    network = network_of(candidate).eval()
    weights = network.state_dict()
    head = [name for name, value in weights.items() if value.shape == (3,)][-1]
    # Its distance is below 0 everywhere, so that the support has gaps.
    weights[head] = weights[head] + torch.tensor([0.0, 0.0, -2.0])
    network.load_state_dict(weights)
    binary = predict(network, phantom.image, candidate)[0]
    low, middle, high = (float(np.quantile(binary, share)) for share in (0.85, 0.88, 0.92))
    path = tmp_path / "best.ckpt"
    torch.save(
        {"format": FORMAT, "version": FORMAT_VERSION, "candidate": candidate.as_mapping(),
         "weights": weights}, path,
    )  # fmt: skip
    arguments = {
        "binary_threshold": [high, middle], "contour_threshold": [None, None],
        "distance_threshold": [-1.0, -1.0], "min_seed_size": 2, "floor": low,
    }  # fmt: skip
    return Segmenter(path, candidate, CONTOUR, arguments)


@pytest.fixture
def paths(tmp_path: Path, phantom: Phantom) -> VolumePaths:
    """Return the files of the phantom, with a voxel size and an origin."""
    write_array(
        tmp_path / "im.h5", phantom.image, voxel_size_nm=(30, 8, 8), origin_nm=(300, 80, 160)
    )
    write_array(tmp_path / "mask.h5", (phantom.mask > 0).astype(np.uint8))
    return VolumePaths("v", str(tmp_path / "im.h5"), None, str(tmp_path / "mask.h5"))


def reference(model: Segmenter, paths: VolumePaths, masked: bool) -> np.ndarray:
    """Return what predicting and decoding at once gives."""
    content = torch.load(model.checkpoint, weights_only=True)
    network = network_of(model.candidate).eval()
    network.load_state_dict(content["weights"])
    mask = read_array(paths.mask) > 0 if masked and paths.mask else None
    maps = predict(network, read_array(paths.image), model.candidate, mask=mask)
    return decode(model.decoder, maps, mask, **model.arguments)


@pytest.mark.parametrize("memory_gb", [2, pytest.param(1e-3, marks=pytest.mark.slow)])
def test_equalised_sections_give_the_instances_of_predicting_at_once(
    tmp_path: Path, model: Segmenter, paths: VolumePaths, monkeypatch: pytest.MonkeyPatch,
    memory_gb: float,
) -> None:  # fmt: skip
    monkeypatch.setattr(segmentation, "PROGRAM_BYTES", 0)
    monkeypatch.setattr(segmentation, "LEAST_BYTES", 0)
    plain = reference(model, paths, True)
    data = model.candidate.data
    transform = data.image_transform.model_copy(update={"normalize": "clahe"})
    data = data.model_copy(update={"image_transform": transform})
    model = replace(model, candidate=model.candidate.model_copy(update={"data": data}))
    expected = reference(model, paths, True)
    segment_volume(model, paths, tmp_path / "seg.h5", memory_gb=memory_gb)
    assert expected.max() > 2
    assert not same_instances(expected, plain)
    assert same_instances(read_array(tmp_path / "seg.h5"), expected)


@pytest.mark.parametrize(
    ("suffix", "masked"),
    [
        (".h5", True), (".zarr", False), (".tif", True),
        *(pytest.param(*row, marks=pytest.mark.slow)
          for row in ((".h5", False), (".zarr", True), (".tif", False))),
    ],
)  # fmt: skip
def test_a_segmentation_has_the_instances_and_the_place_of_its_image(
    tmp_path: Path, model: Segmenter, paths: VolumePaths, suffix: str, masked: bool
) -> None:
    given = paths if masked else replace(paths, mask=None)
    out = tmp_path / f"seg{suffix}"
    found = segment_volume(model, given, out, memory_gb=2)
    labels = read_array(out)
    expected = reference(model, paths, masked)
    assert expected.max() > 2
    assert same_instances(labels, expected)
    assert found.instances == labels.max() == expected.max()
    if masked:
        hosts, _ = ndimage.label(read_array(paths.mask), structure=np.ones((3, 3, 3)))
        expected_hosts = [
            np.unique(hosts[labels == i]).tolist() for i in range(1, labels.max() + 1)
        ]
        assert [[host] for host in found.table.columns["mask_component"]] == expected_hosts
    assert labels.dtype == np.uint16
    with open_lazy(out) as written:
        assert written.voxel_size_nm == (30, 8, 8)
        if suffix != ".tif":
            assert written.origin_nm == (300, 80, 160)
    assert not segmentation.work_folder(out).exists()


def test_a_mask_of_lower_resolution_gives_the_segmentation_of_the_enlarged_one(
    tmp_path: Path, model: Segmenter, paths: VolumePaths
) -> None:
    coarse = read_array(paths.mask or "")[:, ::2, ::2]
    write_array(tmp_path / "coarse.h5", coarse)
    write_array(tmp_path / "enlarged.h5", coarse.repeat(2, 1).repeat(2, 2))
    for name in ("coarse", "enlarged"):
        given = replace(paths, mask=str(tmp_path / f"{name}.h5"))
        segment_volume(model, given, tmp_path / f"{name}.seg.h5", memory_gb=2)
    found, expected = (read_array(tmp_path / f"{n}.seg.h5") for n in ("coarse", "enlarged"))
    assert expected.max() > 2
    np.testing.assert_array_equal(found, expected)


def test_small_memory_gives_the_same_instances_in_many_parts(
    tmp_path: Path, model: Segmenter, paths: VolumePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = segment_volume(model, paths, tmp_path / "one.h5", memory_gb=2)
    monkeypatch.setattr(segmentation, "PROGRAM_BYTES", 0)
    monkeypatch.setattr(segmentation, "LEAST_BYTES", 0)
    parts = segment_volume(model, paths, tmp_path / "parts.h5", memory_gb=1e-3)
    assert plain.blocks == 1
    assert parts.blocks > 1
    assert same_instances(read_array(tmp_path / "one.h5"), read_array(tmp_path / "parts.h5"))
    columns = ["centroid_z", "centroid_y", "centroid_x"]
    one, other = (t.table.frame().sort_values(columns, ignore_index=True) for t in (plain, parts))
    np.testing.assert_allclose(
        one.drop(columns="id").astype(float), other.drop(columns="id").astype(float), rtol=1e-5
    )


@pytest.mark.parametrize("small", [False, True], ids=["at once", "in parts"])
@pytest.mark.parametrize(
    ("annotated", "scored"),
    [([3, 11], None), ([*range(2, 6), *range(9, 15), *range(16, 18)], None),
     ([*range(2, 6), *range(9, 15)], range(3, 12))],
    ids=["single sections", "runs of sections", "with a scored mask"],
)  # fmt: skip
def test_a_mask_of_annotated_sections_is_taken_as_a_study_takes_it(
    tmp_path: Path, model: Segmenter, paths: VolumePaths, phantom: Phantom, small: bool,
    annotated: list[int], scored: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if small:
        monkeypatch.setattr(segmentation, "PROGRAM_BYTES", 1.997e9)
        monkeypatch.setattr(segmentation, "LEAST_BYTES", 0)
    given = {"label": phantom.label.astype(np.uint8)}
    for name, sections in (("mask", annotated), ("scored_mask", scored)):
        if sections is not None:
            given[name] = np.zeros(phantom.label.shape, np.uint8)
            # Not the same in all sections, so that those between hold the union of two.
            for z in sections:
                given[name][z, 2 * z :] = 1
    for name, array in given.items():
        write_array(tmp_path / f"{name}.h5", array)
    files = {name: str(tmp_path / f"{name}.h5") for name in given}
    studied = read_volume(VolumePaths("v", paths.image, **files))
    content = torch.load(model.checkpoint, weights_only=True)
    network = network_of(model.candidate).eval()
    network.load_state_dict(content["weights"])
    maps = predict(network, studied.image, model.candidate, mask=studied.mask)
    expected = decode(model.decoder, maps, studied.mask, **model.arguments)
    assert expected.max() > 2
    best = model.checkpoint.with_suffix(".yaml")
    step = {"name": model.decoder, "kwargs": dict(model.arguments)}
    best.write_text(yaml.safe_dump({"test": {"decoding": [step]}}))
    options = [
        word for name, file in files.items() for word in (f"--{name.replace('_', '-')}", file)
    ]
    out = tmp_path / "seg.h5"
    words = ["segment", best, "--image", paths.image, "--out", out, "--memory-gb", 2, *options]
    assert exit_code([*map(str, words), "--json"]) == 0
    said = capsys.readouterr()
    assert ("sections that are annotated" in said.err) == (scored is None)
    assert same_instances(read_array(out), expected)
    figures = score_labels(
        prediction=expected, truth=phantom.label, mask=studied.where_scored
    ).as_dict()
    found = json.loads(said.out)
    for name in ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50"):
        assert found[name] == pytest.approx(figures[name], abs=1e-12), name


@pytest.mark.parametrize("memory_gb", [2, pytest.param(1e-3, marks=pytest.mark.slow)])
def test_a_volume_without_instances_has_an_empty_table(
    tmp_path: Path, model: Segmenter, paths: VolumePaths, monkeypatch: pytest.MonkeyPatch,
    memory_gb: float,
) -> None:  # fmt: skip
    monkeypatch.setattr(segmentation, "PROGRAM_BYTES", 0)
    monkeypatch.setattr(segmentation, "LEAST_BYTES", 0)
    nothing = replace(model, arguments={**model.arguments, "floor": 1.0})
    found = segment_volume(nothing, paths, tmp_path / "seg.h5", memory_gb=memory_gb)
    assert found.instances == 0
    assert len(found.table.frame()) == 0
    assert "mask_component" in found.table.frame()
    assert not read_array(tmp_path / "seg.h5").any()


class Killed(Exception):
    """Stands for the end of a process."""


class Killing(segmentation.Jobs):
    """Ends the work after some jobs, and inside of a job."""

    def __init__(self, after: int) -> None:
        self.left = after

    def run(self, function: Any, folder: str, numbers: Any) -> Iterator[int]:
        for number in super().run(function, folder, numbers):
            if not self.left:
                raise Killed
            self.left -= 1
            yield number


def test_a_killed_segmentation_goes_on_and_writes_the_same_file(
    tmp_path: Path, model: Segmenter, paths: VolumePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmentation, "PROGRAM_BYTES", 0)
    monkeypatch.setattr(segmentation, "LEAST_BYTES", 0)
    settings: dict[str, Any] = {"memory_gb": 1e-3}
    whole = tmp_path / "whole.h5"
    segment_volume(model, paths, whole, **settings)
    out = tmp_path / "killed.h5"
    real, calls = segmentation.write_atomically, 0

    def dies_once(path: Path, data: bytes) -> Path:
        nonlocal calls
        calls += Path(path).name.startswith("lane_")
        if calls == 3:
            calls += 1
            raise Killed
        return real(path, data)

    monkeypatch.setattr(segmentation, "write_atomically", dies_once)
    with pytest.raises(Killed):
        segment_volume(model, paths, out, **settings)
    for after in (0, 1):
        with pytest.raises(Killed):
            segment_volume(model, paths, out, jobs=Killing(after), **settings)
        assert not out.exists()
        assert segmentation.work_folder(out).is_dir()
    started: list[int] = []
    segment_volume(model, paths, out, **settings, say=lambda step, done, _: started.append(done))
    assert started[0] > 0, "it began anew"
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("first", "then", "goes_on"), [(None, None, True), (2, 3, True), (2, None, True), (3, 2, False)]
)
def test_other_memory_and_workers_lose_nothing_of_a_killed_segmentation(
    tmp_path: Path, model: Segmenter, paths: VolumePaths, monkeypatch: pytest.MonkeyPatch,
    first: float | None, then: float | None, goes_on: bool,
) -> None:  # fmt: skip
    class Memory:
        available = 12e9

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    out, jobs = tmp_path / "seg.h5", Killing(0)
    jobs.workers = 2
    with pytest.raises(Killed):
        segment_volume(model, paths, out, memory_gb=first, jobs=jobs)
    Memory.available = 9e9
    started: list[int] = []
    segment_volume(
        model, paths, out, memory_gb=then, say=lambda step, done, _: started.append(done)
    )
    assert (started[0] > 0) == goes_on
    segment_volume(model, paths, tmp_path / "whole.h5", memory_gb=2)
    np.testing.assert_array_equal(read_array(out), read_array(tmp_path / "whole.h5"))


def test_a_folder_that_is_no_work_folder_stays(
    tmp_path: Path, model: Segmenter, paths: VolumePaths
) -> None:
    note = tmp_path / "seg.h5.work" / "notes.txt"
    note.parent.mkdir()
    note.write_text("mine")
    with pytest.raises(InputError, match="would be lost"):
        segment_volume(model, paths, tmp_path / "seg.h5", memory_gb=2)
    assert note.read_text() == "mine"


def test_jobs_on_one_machine_share_what_is_free(
    tmp_path: Path, model: Segmenter, paths: VolumePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 24e9

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    jobs = Killing(0)
    jobs.workers, jobs.together = 8, 4
    for memory_gb, expected in ((None, 3e9), (2.0, 2e9)):
        out = tmp_path / f"{memory_gb}.h5"
        with pytest.raises(Killed):
            segment_volume(model, paths, out, memory_gb=memory_gb, jobs=jobs)
        plan = json.loads((segmentation.work_folder(out) / "plan.json").read_text())
        assert plan["memory_bytes"] == pytest.approx(expected - segmentation.PROGRAM_BYTES)


def test_the_labels_lie_where_the_mask_says_if_the_image_does_not(
    tmp_path: Path, model: Segmenter, paths: VolumePaths
) -> None:
    assert paths.mask is not None
    write_array(paths.image, read_array(paths.image))
    write_array(paths.mask, read_array(paths.mask), voxel_size_nm=(30, 8, 8), origin_nm=(60, 8, 0))
    found = segment_volume(model, paths, tmp_path / "seg.h5", memory_gb=2)
    with open_lazy(tmp_path / "seg.h5") as labels:
        assert (labels.voxel_size_nm, labels.origin_nm) == ((30, 8, 8), (60, 8, 0))
    assert found.table.frame()["volume_nm3"].gt(0).all()


@pytest.mark.parametrize(
    ("label", "reason"),
    [(np.full((20, 72, 72), 0.5), "Are these probabilities"),
     (np.ones((20, 72, 72), bool), "dtype bool"),
     (np.full((20, 72, 72), -1, np.int16), "negative"),
     (np.full((20, 72, 72), 7, np.int16), "no labelled voxel"),
     (np.zeros((20, 72, 72), np.int16), "no labelled voxel")],
    ids=["floats", "bool", "negative", "ignored", "empty"],
)  # fmt: skip
def test_labels_that_cannot_be_scored_are_refused_before_any_work(
    tmp_path: Path, paths: VolumePaths, capsys: pytest.CaptureFixture[str], label: np.ndarray,
    reason: str,
) -> None:  # fmt: skip
    given = tmp_path / "given.h5"
    write_array(given, label)
    rest = ("--label", given, "--ignore-label", 7, "--out", tmp_path / "seg.h5")
    message = refused(capsys, tmp_path, "--image", paths.image, *rest)
    assert reason in message.partition("given.h5")[2]
    assert not (tmp_path / "seg.h5.work").exists()


def test_labels_outside_the_masks_are_refused_before_any_work(
    tmp_path: Path, paths: VolumePaths, capsys: pytest.CaptureFixture[str]
) -> None:
    label = np.zeros((20, 72, 72), np.uint8)
    label[3, 10:20], label[4, 30:40] = 1, 2
    for name, row in (("label", label), ("one", label == 1), ("other", label == 2)):
        write_array(tmp_path / f"{name}.h5", row.astype(np.uint8))
    rest = ("--image", paths.image, "--label", tmp_path / "label.h5", "--out", tmp_path / "s.h5")
    masks = ("--mask", tmp_path / "one.h5", "--scored-mask", tmp_path / "other.h5")
    assert "no labelled voxel inside the mask" in refused(capsys, tmp_path, *rest, *masks)
    assert "study.db" in refused(capsys, tmp_path, *rest, *masks[:2])


def test_what_fails_after_the_labels_does_not_lose_them(
    tmp_path: Path, model: Segmenter, paths: VolumePaths
) -> None:
    out = tmp_path / "seg.h5"
    with pytest.raises(OSError, match="full"), segmented_volume(model, paths, out, memory_gb=2):
        raise OSError("the disk of the table is full")
    steps: list[tuple[str, int, int]] = []
    segment_volume(model, paths, out, memory_gb=2, say=lambda *step: steps.append(step))
    assert {step for step, done, whole in steps if done < whole} <= {"write"}, "it began anew"
    assert not segmentation.work_folder(out).exists()


def test_two_processes_do_not_segment_to_one_file(
    tmp_path: Path, model: Segmenter, paths: VolumePaths
) -> None:
    out = tmp_path / "seg.h5"
    with segmented_volume(model, paths, out, memory_gb=2):
        with pytest.raises(InputError, match="another process is segmenting"):
            segment_volume(model, paths, out, memory_gb=2)
        segment_volume(model, paths, tmp_path / "other.h5", memory_gb=2)
    names = {path.name for path in tmp_path.iterdir()}
    assert {name for name in names if name.startswith(("seg", "other"))} == {"seg.h5", "other.h5"}


@pytest.mark.parametrize("memory_gb", [2, pytest.param(1e-3, marks=pytest.mark.slow)])
def test_instances_are_measured_where_a_table_is_wanted(
    tmp_path: Path, model: Segmenter, paths: VolumePaths, monkeypatch: pytest.MonkeyPatch,
    memory_gb: float,
) -> None:  # fmt: skip
    monkeypatch.setattr(segmentation, "PROGRAM_BYTES", 0)
    monkeypatch.setattr(segmentation, "LEAST_BYTES", 0)
    full = segment_volume(model, paths, tmp_path / "full.h5", memory_gb=memory_gb)
    bare, out = tmp_path / "bare.h5", tmp_path / "later.h5"
    found = segment_volume(model, paths, bare, memory_gb=memory_gb, table=False)
    assert found.instances == full.instances > 2
    assert list(found.table.columns) == ["id"]
    assert bare.read_bytes() == (tmp_path / "full.h5").read_bytes()
    with (
        pytest.raises(Killed),
        segmented_volume(model, paths, out, memory_gb=memory_gb, table=False),
    ):
        raise Killed
    steps: list[tuple[str, int, int]] = []
    later = segment_volume(
        model, paths, out, memory_gb=memory_gb, say=lambda *step: steps.append(step)
    )
    assert all(done == whole for step, done, whole in steps if step == "predict"), "began anew"
    for name, column in full.table.columns.items():
        np.testing.assert_array_equal(later.table.columns[name], column)


def test_other_thresholds_do_not_go_on_from_a_killed_segmentation(
    tmp_path: Path, model: Segmenter, paths: VolumePaths
) -> None:
    out = tmp_path / "seg.h5"
    with pytest.raises(Killed):
        segment_volume(model, paths, out, memory_gb=2, jobs=Killing(1))
    other = replace(model, arguments={**model.arguments, "min_instance_size": 30})
    found = segment_volume(other, paths, out, memory_gb=2)
    assert found.instances == reference(other, paths, True).max()


def test_the_table_measures_what_is_there(tmp_path: Path) -> None:
    z, y, x = np.mgrid[:20, :60, :60]
    ball = ((z - 8) * 30.0) ** 2 + ((y - 30) * 10.0) ** 2 + ((x - 28) * 10.0) ** 2 <= 150.0**2
    labels = ball.astype(np.int32)
    labels[15:18, 50:60, 5:9] = 2
    mask = np.ones(labels.shape, bool)
    mask[:, :, :5] = False
    table = segmentation.instances_of(
        labels, np.where(ball, 0.75, 0.5).__getitem__, mask, first=(100, 200, 300),
        shape=(200, 260, 500), voxel_size_nm=(30, 10, 10), origin_nm=None,
    )  # fmt: skip
    assert list(table["id"]) == [1, 2]
    assert [table[f"centroid_{a}"][0] for a in "zyx"] == pytest.approx([108, 230, 328])
    assert table["centroid_z_nm"][0] == pytest.approx(108 * 30)
    assert table["voxels"][1] == 3 * 10 * 4
    assert table["volume_nm3"][1] == 120 * 3000
    assert table["equivalent_diameter_nm"][0] == pytest.approx(300, rel=0.03)
    assert table["surface_nm2"][0] == pytest.approx(4 * np.pi * 150**2, rel=0.16)
    assert 0.8 < table["sphericity"][0] < 1.02
    assert table["sphericity"][1] < table["sphericity"][0]
    assert list(table["sections"]) == [11, 3]
    assert list(table["touches_border"]) == [False, True]
    assert list(table["touches_mask"]) == [False, True]
    assert list(table["probability"]) == [0.75, 0.5]
    unknown = segmentation.instances_of(
        labels, np.zeros(labels.shape).__getitem__, None, first=(0, 0, 0), shape=labels.shape,
        voxel_size_nm=None, origin_nm=None,
    )  # fmt: skip
    assert np.isnan(unknown["volume_nm3"]).all()


def test_a_mask_of_another_shape_is_refused_before_any_work(
    tmp_path: Path, model: Segmenter, paths: VolumePaths
) -> None:
    write_array(tmp_path / "small.h5", np.ones((3, 4, 5), np.uint8))
    wrong = replace(paths, mask=str(tmp_path / "small.h5"))
    with pytest.raises(InputError, match=r"small.h5.*\(3, 4, 5\)"):
        segment_volume(model, wrong, tmp_path / "seg.h5", memory_gb=2)
    with pytest.raises(VolumeError, match="no such file"):
        segment_volume(model, replace(paths, image="absent.h5"), tmp_path / "seg.h5", memory_gb=2)
    assert not (tmp_path / "seg.h5.work").exists()


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "NaN"), (0.0, "no voxel above 0"), (-1.0, "no voxel above 0")]
)
@pytest.mark.parametrize("scored", [None, "scored.h5"])
def test_a_mask_in_which_nothing_counts_is_refused(
    tmp_path: Path, paths: VolumePaths, value: float, reason: str, scored: str | None
) -> None:
    with open_lazy(paths.image, ndim=3) as image:
        mask = np.full(image.shape, value, np.float32)
    write_array(tmp_path / "none.h5", mask)
    with pytest.raises(VolumeError, match=rf"none\.h5.*{reason}"):
        gaps_of_tissue(paths.image, str(tmp_path / "none.h5"), scored)


def test_a_plan_is_plain_json(tmp_path: Path, model: Segmenter, paths: VolumePaths) -> None:
    out = tmp_path / "seg.h5"
    with pytest.raises(Killed):
        segment_volume(model, paths, out, memory_gb=2, jobs=Killing(0))
    plan = json.loads((segmentation.work_folder(out) / "plan.json").read_text())
    assert plan["arguments"] == dict(model.arguments)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Return the message of a command that must end with exit 2."""
    assert exit_code(["segment", *map(str, words)]) == 2
    message = capsys.readouterr().err
    assert "error:" in message
    return message


def test_segment_refuses_what_it_cannot_segment_with(
    tmp_path: Path, model: Segmenter, paths: VolumePaths, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ("--image", paths.image, "--out", tmp_path / "seg.h5", "--memory-gb", 2)
    assert "record.json" in refused(capsys, model.checkpoint, *rest)
    assert "no such file or folder" in refused(capsys, tmp_path / "absent", *rest)
    lonely = tmp_path / "lonely.yaml"
    lonely.write_text("test: {decoding: [{name: decode_instance_watershed_distance}]}")
    assert "lonely.ckpt" in refused(capsys, lonely, *rest)
    fitting = model.checkpoint.with_suffix(".yaml")
    fitting.write_text(lonely.read_text())
    assert "seg.png" in refused(
        capsys, fitting, "--image", paths.image, "--out", tmp_path / "seg.png"
    )
    assert "would be lost" in refused(capsys, fitting, "--image", paths.image, "--out", paths.image)
    assert "Name one of these" in refused(capsys, paths.image, *rest)
    trial = tmp_path / "trial"
    trial.mkdir()
    (trial / "notes").write_text("of the user")
    assert "--storage" not in refused(capsys, trial, *rest)
    (trial / "best.ckpt").write_bytes(model.checkpoint.read_bytes())
    assert f"Give its checkpoint: {trial / 'best.ckpt'}" in refused(capsys, trial, *rest)
    assert "--storage" not in refused(capsys, f"sqlite:///{tmp_path}/absent.db", *rest)
    assert "no file of SQLite" in refused(capsys, trial / "notes", *rest)
    assert "nonsense" in refused(capsys, fitting, *rest, "--set", "nonsense=1")
    assert not (tmp_path / "seg.h5").exists()
    assert exit_code(["segment", *map(str, (fitting, *rest))]) == 0


def test_parts_of_one_volume_are_scored_as_the_whole(phantom: Phantom) -> None:
    found = decode(CONTOUR, degraded_probabilities(phantom.label, seed=2))
    whole = score_labels(prediction=found, truth=phantom.label, mask=phantom.mask)
    parts = [
        contingency_table(prediction=found[z : z + 3], truth=phantom.label[z : z + 3], mask=mask)
        for z in range(0, 20, 3)
        if (mask := phantom.mask[z : z + 3]).any()
    ]
    assert score(of_one_volume(parts)).as_dict() == whole.as_dict()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ray_workers_write_the_file_that_one_process_writes(
    tmp_path: Path, model: Segmenter, paths: VolumePaths
) -> None:
    """Two nodes of one core each; image and mask are named as in this folder."""
    environment = {**os.environ, **ENVIRONMENT}
    best = tmp_path / "best.yaml"
    step = {"name": model.decoder, "kwargs": dict(model.arguments)}
    best.write_text(yaml.safe_dump({"test": {"decoding": [step]}}))
    words = ["segment", "best.yaml", "--image", "im.h5", "--mask", "mask.h5", "--device", "cpu",
             "--memory-gb", "2", "--json"]  # fmt: skip

    def segmented(*more: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "hydralv_tune", *words, *more], cwd=tmp_path, text=True,
            capture_output=True, env={**environment, "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    alone = segmented("--out", "alone.h5", "--table", "alone.csv")
    assert alone["instances"] > 2
    with ray_cluster({"num_cpus": 1}, {"num_cpus": 1}) as (address, _):
        segmented("--out", "spread.h5", "--table", "spread.csv", "--ray-address", address)
    for suffix in (".h5", ".csv"):
        one, other = (tmp_path / f"{name}{suffix}" for name in ("alone", "spread"))
        assert one.read_bytes() == other.read_bytes(), suffix
