"""A file that states no voxel size can be searched on; what needs one is refused at the start."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.search_space import SearchSpace, space_from_mapping
from hydralv_tune.config.search_space_files import load_space, with_fixed
from hydralv_tune.data.volumes import VolumePaths, volume_paths, write_array
from hydralv_tune.launch.run import run_study
from hydralv_tune.launch.voxel_sizes import UNIT, searchable

RESOLUTION = {"data": {"train_resolution": [30, 8, 8]}}
IN_NANOMETRES = {"data": {"label_transform": {"edt_voxel_size": "volume"}}}

SEEDED = {"system": {"seed": 1}}


def volumes(folder: Path, *sizes: tuple[float, float, float] | None) -> list[VolumePaths]:
    """Return small volumes on disk, each with the voxel size that it states."""
    label = np.zeros((8, 32, 32), np.uint8)
    label[2:5, 8:20, 8:20] = 1
    for number, size in enumerate(sizes):
        write_array(folder / f"im_{number}.h5", label * 100, voxel_size_nm=size)
        write_array(folder / f"label_{number}.h5", label)
    files = [
        [str(folder / f"{kind}_{n}.h5") for n in range(len(sizes))] for kind in ("im", "label")
    ]
    return volume_paths(*files)


def space(**keys: Any) -> SearchSpace:
    return space_from_mapping({"name": "mine", "base": "smoke", **keys})


def test_hydra_lv_leaves_the_choice_out_where_a_volume_states_no_voxel_size(tmp_path: Path) -> None:
    given = load_space("hydra_lv")
    assert UNIT in given.parameters
    mixed = volumes(tmp_path, (30.0, 8.0, 8.0), None)
    with pytest.warns(
        UserWarning, match=r"'im_1' states no.*--set data\.train_resolution=\[30,8,8\]"
    ):
        left = searchable(given, mixed)
    assert set(given.parameters) - set(left.parameters) == {UNIT}
    for name in given.warm_starts:
        chosen = left.candidate(left.warm_start(name).params, left.recipes[name])
        assert chosen.data.label_transform.edt_voxel_size == "unit"
    # Another driver of the same study finds the same space.
    with pytest.warns(UserWarning, match="states no voxel size"):
        assert searchable(given, mixed).as_mapping() == left.as_mapping()


def test_where_all_sizes_are_known_everything_is_searched(tmp_path: Path) -> None:
    given = load_space("hydra_lv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert searchable(given, volumes(tmp_path, (30.0, 8.0, 8.0))) is given
        told = with_fixed(given, RESOLUTION)
        assert searchable(told, volumes(tmp_path, None)) is told


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({"fixed": IN_NANOMETRES}, "base 'smoke' of mine"),
        ({"warm_starts": ["r"], "recipes": {"r": IN_NANOMETRES}}, "warm start 'r'"),
        ({"parameters": {UNIT: {"choice": ["volume"]}}}, "choice volume"),
        (
            {"parameters": {"unit": {"choice": {"few": SEEDED, "nm": IN_NANOMETRES}}}},
            "parameter unit, choice nm",
        ),
    ],
)
def test_what_needs_a_voxel_size_is_refused_before_anything_is_written(
    tmp_path: Path, keys: dict[str, Any], place: str
) -> None:
    paths = volumes(tmp_path, None)
    out = tmp_path / "out"
    storage = f"sqlite:///{out / 'study.db'}"
    with pytest.raises(
        ConfigError, match=rf"'im_0' states no voxel size.*{place}.*train_resolution"
    ):
        run_study(space(**keys), paths, study="s", storage=storage, out=out)
    assert not out.exists()
    assert searchable(with_fixed(space(**keys), RESOLUTION), paths)
