"""Targets: equal to the public tool's vectors, to slow references, and on either device."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import binary_erosion, distance_transform_edt

from hydralv_tune.numerics.targets import (
    TARGETS,
    binary_target,
    connected_pieces,
    derive_targets,
    instance_boundary,
    instance_edt,
)

Labels = npt.NDArray[np.int32]
SMALL = arrays(np.int32, (3, 6, 7), elements=st.integers(0, 3))


def ball(radius: float, shape: tuple[int, int, int], spacing: float = 1.0) -> Labels:
    """Return one ball in the middle, sections `spacing` times as far apart as voxels."""
    z, y, x = np.indices(shape)
    middle = [(n - 1) / 2 for n in shape]
    square = ((z - middle[0]) * spacing) ** 2 + (y - middle[1]) ** 2 + (x - middle[2]) ** 2
    return (square <= radius**2).astype(np.int32)


@pytest.fixture(scope="module")
def vectors(shared_data: Path) -> dict[str, npt.NDArray[np.generic]]:
    with np.load(shared_data / "pytc-decoding" / "vectors.npz") as stored:
        return {name: stored[name] for name in ("labels", "binary", "boundary", "edt")}


class TestVectorsOfThePublicTool:
    def test_binary_is_equal(self, vectors: dict[str, npt.NDArray[np.generic]]) -> None:
        assert np.array_equal(binary_target(vectors["labels"]), vectors["binary"].astype(bool))

    def test_boundary_is_equal(self, vectors: dict[str, npt.NDArray[np.generic]]) -> None:
        boundary = instance_boundary(vectors["labels"])
        assert np.array_equal(boundary, vectors["boundary"].astype(bool))

    def test_distance_is_equal_to_1e_5(self, vectors: dict[str, npt.NDArray[np.generic]]) -> None:
        distance = instance_edt(vectors["labels"])
        assert distance.dtype == np.float32
        np.testing.assert_allclose(distance, vectors["edt"], atol=1e-5, rtol=0)

    def test_the_device_derives_the_same(self, vectors: dict[str, npt.NDArray[np.generic]]) -> None:
        labels = torch.from_numpy(vectors["labels"].astype(np.int32))[None]
        edt = torch.from_numpy(vectors["edt"])[None]
        targets = derive_targets(labels, edt)[0].numpy()
        for channel, name in enumerate(("binary", "boundary", "edt")):
            assert np.array_equal(targets[channel], vectors[name].astype(np.float32))


class TestBoundary:
    def test_hand_worked_square(self) -> None:
        labels = np.zeros((1, 5, 5), dtype=np.int32)
        labels[0, 1:4, 1:4] = 7
        wanted = np.array(
            [
                [0, 1, 1, 1, 0],
                [1, 1, 1, 1, 1],
                [1, 1, 0, 1, 1],
                [1, 1, 1, 1, 1],
                [0, 1, 1, 1, 0],
            ],
            dtype=bool,
        )
        assert np.array_equal(instance_boundary(labels)[0], wanted)

    def test_sections_are_apart_in_2d_and_joined_in_3d(self) -> None:
        labels = np.zeros((3, 4, 4), dtype=np.int32)
        labels[1] = 1
        assert not instance_boundary(labels, mode="2d").any()
        assert instance_boundary(labels, mode="3d").all()

    @pytest.mark.parametrize("thickness", [1, 2])
    def test_inner_leaves_a_core_and_nothing_outside(self, thickness: int) -> None:
        labels = np.zeros((2, 9, 12), dtype=np.int32)
        labels[:, 1:8, 1:6] = 1
        labels[:, 1:8, 6:11] = 2
        found = instance_boundary(labels, thickness=thickness, edge_mode="inner")
        core = np.zeros(labels.shape, bool)
        cross = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]])
        for one in (1, 2):
            core |= binary_erosion(labels == one, cross, iterations=thickness)
        assert np.array_equal(found, (labels > 0) & ~core)
        edt = torch.zeros((1, *labels.shape))
        batch = torch.from_numpy(labels)[None]
        targets = derive_targets(batch, edt, thickness=thickness, edge_mode="inner")
        assert np.array_equal(targets[0, 1].numpy() > 0, found)

    def test_only_touching_instances_count_in_seg_no_bg(self) -> None:
        labels = np.array([[[0, 1, 1, 2, 2, 0]]], dtype=np.int32)
        found = instance_boundary(labels, edge_mode="seg-no-bg")[0, 0]
        assert found.tolist() == [False, False, True, True, False, False]

    @settings(max_examples=40, deadline=None)
    @given(labels=SMALL, thickness=st.integers(1, 3), mode=st.sampled_from(["2d", "3d"]))
    def test_it_is_another_label_within_so_many_steps(
        self, labels: Labels, thickness: int, mode: str
    ) -> None:
        found = instance_boundary(labels, thickness=thickness, mode=mode)
        points = np.argwhere(np.ones_like(labels))
        for point in points[::7]:
            steps = np.abs(points - point)
            near = steps.sum(axis=1) <= thickness
            if mode == "2d":
                near &= steps[:, 0] == 0
            others = {int(labels[tuple(p)]) for p in points[near]}
            assert found[tuple(point)] == (len(others) > 1)

    @settings(max_examples=25, deadline=None)
    @given(labels=SMALL)
    def test_a_patch_shows_what_the_volume_shows_inside_it(self, labels: Labels) -> None:
        volume = instance_boundary(labels)
        patch = instance_boundary(labels[:, 1:-1, 1:-1])
        assert np.array_equal(patch[:, 1:-1, 1:-1], volume[:, 2:-2, 2:-2])
        assert not (patch & ~volume[:, 1:-1, 1:-1]).any()

    def test_the_edge_of_a_volume_is_no_boundary(self) -> None:
        assert not instance_boundary(np.ones((3, 4, 5), dtype=np.uint16), mode="3d").any()


class TestDistance:
    def test_hand_worked_line(self) -> None:
        labels = np.array([[[0, 5, 5, 5, 5, 5, 0]]], dtype=np.int32)
        wanted = np.array([-1, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, -1], dtype=np.float32)
        np.testing.assert_allclose(instance_edt(labels)[0, 0], wanted, atol=1e-6)

    def test_every_instance_reaches_one(self) -> None:
        labels = np.zeros((9, 30, 30), dtype=np.int32)
        labels[2:7, 2:9, 2:9] = 1
        labels[1:8, 12:28, 12:28] = 2
        distance = instance_edt(labels)
        assert distance[labels == 1].max() == distance[labels == 2].max() == 1
        assert (distance[labels == 0] == -1).all()
        assert (distance[labels > 0] > 0).all()

    def test_touching_instances_are_measured_apart(self) -> None:
        labels = np.zeros((1, 12, 20), dtype=np.int32)
        labels[:, 2:10, 2:10], labels[:, 2:10, 10:18] = 1, 2
        apart = np.maximum(
            instance_edt(labels * (labels == 1)), instance_edt(labels * (labels == 2))
        )
        np.testing.assert_allclose(instance_edt(labels), apart)

    def test_holes_count_as_inside(self) -> None:
        solid = ball(6, (15, 15, 15))
        hollow = solid * (1 - ball(2, (15, 15, 15)))
        np.testing.assert_array_equal(instance_edt(hollow), instance_edt(solid))

    def test_pieces_of_one_id_have_maxima_of_their_own(self) -> None:
        labels = np.zeros((1, 12, 24), dtype=np.int32)
        labels[0, 1:4, 1:4] = 1
        labels[0, 1:11, 10:22] = 1
        distance = instance_edt(labels)
        assert distance[0, 1:4, 1:4].max() == distance[0, 1:11, 10:22].max() == 1

    def test_large_ids_need_no_more_memory(self) -> None:
        labels = ball(4, (9, 9, 9)).astype(np.uint64) * 2**40
        np.testing.assert_array_equal(instance_edt(labels), instance_edt(ball(4, (9, 9, 9))))

    def test_voxel_size_makes_a_squashed_ball_round(self) -> None:
        squashed = ball(16, (9, 41, 41), spacing=4.0)
        physical = instance_edt(squashed, voxel_size_nm=(32, 8, 8))
        unit = instance_edt(squashed)
        # A quarter of the radius below the top of a ball the distance is a quarter, in nm.
        middle = (4, 20, 20)
        assert physical[middle] == unit[middle] == 1
        assert physical[1, 20, 20] == pytest.approx(0.25, abs=0.05)
        assert physical[4, 20, 24] == pytest.approx(0.75, abs=0.05)
        assert unit[4, 20, 24] > 0.95

    def test_only_the_ratio_of_the_voxel_size_matters(self) -> None:
        labels = ball(8, (7, 21, 21), spacing=3.75)
        one = instance_edt(labels, voxel_size_nm=(30, 8, 8))
        np.testing.assert_allclose(one, instance_edt(labels, voxel_size_nm=(3.75, 1, 1)), atol=1e-6)

    def test_2d_measures_within_the_section(self) -> None:
        labels = ball(6, (13, 13, 13))
        flat = instance_edt(labels, mode="2d")
        section = distance_transform_edt(labels[6])
        np.testing.assert_allclose(flat[6][labels[6] > 0], (section / section.max())[labels[6] > 0])

    def test_an_instance_that_fills_the_volume_has_a_middle(self) -> None:
        distance = instance_edt(np.ones((5, 5, 5), dtype=np.int32))
        assert distance[2, 2, 2] == distance.max() == 1
        assert distance.min() > 0

    def test_nothing_labelled_is_outside_everywhere(self) -> None:
        assert (instance_edt(np.zeros((3, 4, 5), dtype=np.int32)) == -1).all()

    def test_quantised_classes_count_tenths(self) -> None:
        labels = np.array([[[0, *[1] * 9, 0]]], dtype=np.int32)
        classes = "0 3 5 7 9 10 9 7 5 3 0"
        assert instance_edt(labels, quantize=True)[0, 0].tolist() == [
            int(c) for c in classes.split()
        ]

    def test_a_real_volume_of_285_vesicles_takes_seconds(self, shared_data: Path) -> None:
        h5py = pytest.importorskip("h5py")
        with h5py.File(shared_data / "hydra-11-5" / "label.h5") as file:
            labels = file["main"][:, :400, :400]
        start = perf_counter()
        distance = instance_edt(labels)
        assert perf_counter() - start < 10
        assert ((distance > 0) | (labels == 0)).all()
        ids = np.unique(labels[labels > 0])
        assert len(ids) > 50
        for identity in ids[:5]:
            assert distance[labels == identity].max() == 1


class TestDevice:
    @settings(max_examples=25, deadline=None)
    @given(labels=SMALL, thickness=st.integers(1, 2), mode=st.sampled_from(["2d", "3d"]))
    def test_equal_to_numpy(self, labels: Labels, thickness: int, mode: str) -> None:
        edt = instance_edt(labels)
        derived = derive_targets(
            torch.from_numpy(labels)[None],
            torch.from_numpy(edt)[None],
            thickness=thickness,
            mode=mode,
        )[0].numpy()
        assert np.array_equal(derived[0], binary_target(labels))
        assert np.array_equal(derived[1], instance_boundary(labels, thickness=thickness, mode=mode))
        assert np.array_equal(derived[2], edt)

    def test_samples_of_a_batch_do_not_touch(self) -> None:
        labels = torch.zeros(2, 3, 4, 4, dtype=torch.int32)
        labels[1] = 1
        targets = derive_targets(labels, torch.full(labels.shape, -1.0), mode="3d")
        assert targets.shape == (2, 3, 3, 4, 4)
        assert not targets[:, 1].any()

    def test_runs_without_asking_the_device(self) -> None:
        labels = torch.zeros(2, 3, 4, 4, dtype=torch.int32, device="meta")
        assert derive_targets(labels, labels.float()).device.type == "meta"


class TestBadInput:
    def test_float_labels_are_refused(self) -> None:
        for target in TARGETS.values():
            with pytest.raises(ValueError, match="integers"):
                target(np.zeros((2, 3, 4)))

    @pytest.mark.parametrize("name", ["instance_boundary", "instance_edt"])
    def test_a_flat_image_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="Z, Y, X"):
            TARGETS[name](np.zeros((3, 4), dtype=np.int32))

    @pytest.mark.parametrize(
        "arguments", [{"mode": "4d"}, {"edge_mode": "some"}, {"thickness": 0}], ids=str
    )
    def test_unknown_boundary_arguments_are_refused(self, arguments: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            instance_boundary(np.zeros((2, 3, 4), dtype=np.int32), **arguments)  # type: ignore[arg-type]

    @pytest.mark.parametrize("size", [(30, 8), (30, 0, 8), (30, 8, float("nan"))], ids=str)
    def test_a_wrong_voxel_size_is_refused(self, size: tuple[float, ...]) -> None:
        with pytest.raises(ValueError, match="three positive"):
            instance_edt(np.zeros((2, 3, 4), dtype=np.int32), voxel_size_nm=size)

    def test_shapes_that_differ_are_refused(self) -> None:
        with pytest.raises(ValueError, match="must both"):
            derive_targets(torch.zeros(1, 2, 3, 4, dtype=torch.int32), torch.zeros(1, 2, 3, 5))


def test_pieces_are_joined_over_corners() -> None:
    labels = np.zeros((2, 2, 4), dtype=np.int32)
    labels[0, 0, 0] = labels[1, 1, 1] = labels[0, 0, 3] = 4
    assert connected_pieces(labels).max() == 2
