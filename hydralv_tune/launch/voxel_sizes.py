"""What a study searches where a volume does not state its voxel size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from hydralv_tune.config.candidate import Data
from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.files import layered
from hydralv_tune.config.search_space import SearchSpace
from hydralv_tune.config.search_space_rules import check_space
from hydralv_tune.config.validation import nested, value_at
from hydralv_tune.data.volumes import VolumePaths, first_voxel_size

UNIT = "data.label_transform.edt_voxel_size"
GIVE_IT = "--set data.train_resolution=[30,8,8] (nanometres along z, y, x)"


def searchable(space: SearchSpace, volumes: Sequence[VolumePaths]) -> SearchSpace:
    """Return the space without the distances in nanometres that the volumes cannot give.

    A choice between the units is left to the voxel, with a warning; where nanometres are no choice,
    every such trial would fail, and nothing is begun.

    Args:
        space: What is to be searched.
        volumes: What is trained on; only the heads of their files are read.

    Raises:
        ConfigError: A volume states no voxel size, and the base, a recipe or a named choice
            needs it.
        VolumeError: A file cannot be opened.
    """
    unknown = next((paths.name for paths in volumes if first_voxel_size(paths) is None), None)
    if unknown is None:
        return space
    parameter = space.parameters.get(UNIT)
    is_choice = parameter is not None and "unit" in parameter.choices
    if is_choice and space.candidate({}).data.train_resolution is None:
        rest = {key: value for key, value in space.parameters.items() if key != UNIT}
        fixed = layered(space.fixed, nested(UNIT, "unit"))
        space = space.model_copy(update={"parameters": rest, "fixed": fixed})
        check_space(space, f"{space.name} without {UNIT}")
        warnings.warn(
            f"Volume '{unknown}' states no voxel size, so {UNIT}: volume is not searched; "
            f"distances are learned in voxels. To search it too, give {GIVE_IT}.",
            stacklevel=2,
        )
    for place, data in _blocks(space):
        if data.label_transform.edt_voxel_size == "volume" and data.train_resolution is None:
            raise ConfigError(
                f"Volume '{unknown}' states no voxel size, but {place} has {UNIT}: volume. "
                f"Give {GIVE_IT}, or take {UNIT}: unit."
            )
    return space


def _blocks(space: SearchSpace) -> Iterator[tuple[str, Data]]:
    """Yield `data` of the base, of each recipe that is enqueued, and of what a parameter says."""
    yield f"base '{space.base}' of {space.name}", space.candidate({}).data
    for name in space.warm_starts:
        yield f"warm start '{name}'", space.candidate({}, space.recipes.get(name)).data
    for key, parameter in space.parameters.items():
        named = parameter.choice if isinstance(parameter.choice, dict) else {}
        blocks = {**named, **({"volume": nested(UNIT, "volume")} if key == UNIT else {})}
        for name, block in blocks.items():
            if value_at(block, UNIT) == "volume":
                yield f"parameter {key}, choice {name},", space.candidate({}, block).data
