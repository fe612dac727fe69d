"""Studies for scripts and notebooks: run one, open one, take out what it has found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hydralv_tune.api.volumes import Array, decode, predict, stored
from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.errors import StudyError
from hydralv_tune.config.paths import expanded, expanded_path, expanded_url
from hydralv_tune.config.search_space import SearchSpace
from hydralv_tune.config.search_space_files import load_space
from hydralv_tune.data.volumes import Volume, VolumePaths

if TYPE_CHECKING:
    import pandas as pd

    from hydralv_tune.launch.coordinator import Event
    from hydralv_tune.study.study import Study


@dataclass(frozen=True)
class RunOptions:
    """How a study is run; what is left out has the value of the command `run`.

    Args:
        study: Name of the study; that of the space.
        storage: `sqlite:///FILE` or `postgresql+psycopg://…`; `OUT/study.db`.
        trials: COMPLETE and PRUNED trials in all; the space's budget.
        timeout_s: Wall clock of this call in seconds; the space's budget.
        gpus_per_trial: May be a fraction; 1 where there is a GPU, else 0.
        cpus_per_trial: Cores a trial takes; all, divided by the trials that fit.
        ray_address: Ray cluster to join; one starts here and ends with the call.
        checkpoints: Folder or URL that machines share which do not share `out`.
        extend: Accept that the space has changed since the study began.
        warm_start_from: Another study of the same storage whose fitting trials are added.
        learn_from: Earlier studies that teach which candidates to try first: folders, or URLs with
            `/STUDY` where a storage holds several. `("none",)` for none at all; by default what
            ships with the package, for a new study with the sampler `tpe`.
        on_event: Called in this thread with each event: `kind`, `number`, `fields`.
    """

    study: str | None = None
    storage: str | None = None
    trials: int | None = None
    timeout_s: float | None = None
    gpus_per_trial: float | None = None
    cpus_per_trial: int | None = None
    ray_address: str | None = None
    checkpoints: str | None = None
    extend: bool = False
    warm_start_from: str | None = None
    learn_from: Sequence[str] = ()
    on_event: Callable[[Event], None] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class StudyResults:
    """What a study has found so far; each property reads the database anew.

    Args:
        storage: Its database.
        name: Its name.
        folder: Its folder, where it was opened by that; the database knows it otherwise.
    """

    storage: str
    name: str
    folder: Path | None = None

    @property
    def trials(self) -> pd.DataFrame:
        """Return one row for each finished trial: number, state, value, params, metrics."""
        with self._opened() as study:
            return study.table()

    @property
    def facts(self) -> dict[str, Any]:
        """Return what `status --json` prints: counts by state, best trial, paths."""
        with self._opened() as study:
            return study.facts()

    @property
    def best(self) -> dict[str, Any] | None:
        """Return the best trial: number, figures, params and decoding; None before the first."""
        found: dict[str, Any] | None = self.facts["best"]
        return found

    @property
    def candidate(self) -> Candidate:
        """Return the whole configuration of the best trial.

        Raises:
            StudyError: No trial is finished.
            InputError: The study's folder is not here.
        """
        from hydralv_tune.results.best_trial import load_best_trial

        with load_best_trial(self.storage, self.name, self.folder) as best:
            return best.candidate

    @property
    def checkpoint(self) -> Path:
        """Return the weights of the best trial, which `predict` takes.

        Raises:
            StudyError: No trial is finished.
            InputError: The study's folder or the checkpoint is not here.
        """
        from hydralv_tune.results.best_trial import load_best_trial

        with load_best_trial(self.storage, self.name, self.folder) as best:
            return best.checkpoint

    def segmentation(self, volume: int = 0) -> npt.NDArray[np.integer[Any]]:
        """Return the best trial's segmentation of what it was scored on.

        Args:
            volume: Which of the scored volumes, or parts of volumes, in their order.

        Returns:
            (Z, Y, X) instance ids, 0 is background.

        Raises:
            StudyError: No trial is finished, or it was scored on fewer volumes.
            InputError: The study's folder or a volume is not here.
        """
        from hydralv_tune.results.best_trial import load_best_trial
        from hydralv_tune.results.scored_volumes import scored_volumes

        with load_best_trial(self.storage, self.name, self.folder) as best:
            parts = scored_volumes(best)
        if not 0 <= volume < len(parts):
            raise StudyError(
                f"Study '{self.name}': volume {volume} is asked for, but {len(parts)} were scored, "
                "counted from 0."
            )
        return parts[volume].prediction

    @contextmanager
    def _opened(self) -> Iterator[Study]:
        """Open the study for reading."""
        from hydralv_tune.study.study import open_readonly

        study = open_readonly(self.storage, self.name, self.folder)
        try:
            yield study
        finally:
            study.close()


def open_study(folder_or_url: str | Path | None = None, study: str | None = None) -> StudyResults:
    """Open a study for reading.

    Args:
        folder_or_url: The folder that `run` wrote, or the URL of a storage; the newest study under
            `runs/` without.
        study: Its name; needed only where the storage holds several.

    Raises:
        StudyError: There is no such storage or study, or there are several.
    """
    from hydralv_tune.study.find import find_study
    from hydralv_tune.study.study import open_readonly

    found = find_study(folder_or_url, study=study)
    open_readonly(found.storage, found.name, found.folder).close()
    return StudyResults(found.storage, found.name, found.folder)


def run_study(
    space: SearchSpace | str | Path,
    volumes: Sequence[Volume | VolumePaths],
    out: str | Path,
    options: RunOptions | None = None,
) -> StudyResults:
    """Start a study, or continue the one of that name, as the command `run` does.

    Pictures and notes for the dashboard are written as the command writes them.

    Args:
        space: A search space, a file, or a name in `search_spaces/`.
        volumes: What is trained on and scored, with labels. Arrays are written below `out`, where
            workers and later calls find them.
        out: Folder of the study.
        options: Budget, storage, resources.

    Raises:
        InputError: Space, volumes, storage or cluster break a rule; nothing of the study is
            written then.
        StudyInterrupted: Ctrl-C or SIGTERM came; the same call goes on.
        StudyFailed: Trial after trial fails.
    """
    searched = space if isinstance(space, SearchSpace) else load_space(space)
    chosen, folder = options or RunOptions(), expanded_path(out)
    name = chosen.study or searched.name
    storage = expanded_url(chosen.storage or f"sqlite:///{folder / 'study.db'}")
    paths = stored(volumes, folder)

    from hydralv_tune.launch.run import run_study as launch_study
    from hydralv_tune.results.ensemble import ensemble_after_study
    from hydralv_tune.results.publish import publish_study_end, publish_trial_change

    launch_study(
        searched,
        paths,
        **{**vars(chosen), "study": name, "storage": storage},
        out=folder,
        on_trial_end=publish_trial_change,
        on_trial_running=publish_trial_change,
    )
    publish_study_end(storage, name)
    trials = chosen.trials or searched.budget.trials
    ensemble_after_study(storage, name, trials, lambda sentence: None, folder)
    return StudyResults(storage, name, folder)


def segment(
    best: StudyResults | str | Path,
    image: Array | str | Path,
    mask: Array | str | Path | None = None,
    *,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    **changed: Any,
) -> Array:
    """Segment a volume in memory with the weights and thresholds that were found to be best.

    The command `segment` does it from disk to disk, for a volume of any size.

    Args:
        best: A study, its folder or the URL of its storage, an exported YAML file, or a
            checkpoint with its record beside it.
        image: (Z, Y, X) in any dtype, normalised as in training; or its file.
        mask: (Z, Y, X), above 0 where there is tissue; or its file.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: Called with windows done and in all.
        changed: Arguments of the decoder that replace the found ones, as `min_instance_size=200`.

    Returns:
        (Z, Y, X) int32, ids from 1, 0 is background.

    Raises:
        InputError: `best` is none of these, or image and mask do not fit.
        CheckpointError: The checkpoint is damaged or of another tool.
        StudyError: There is no such study, or no trial of it is finished.
    """
    from hydralv_tune.results.segmentation import load_model

    if isinstance(best, StudyResults):
        place, name = str(best.folder or best.storage), best.name
    else:
        place, name = expanded(best), None
    model = load_model(place, study=name, changed=changed)
    maps = predict(model.checkpoint, image, device=device, progress=progress)
    return decode(maps, mask, decoder=model.decoder, **model.arguments)


def export_best(
    study: StudyResults | str | Path, out: str | Path, *, format: str = "hydralv"
) -> dict[str, Any]:
    """Write the best configuration of a study, its checkpoint beside it.

    Args:
        study: A study, its folder, or the URL of its storage.
        out: The YAML file.
        format: A name that `hydralv-tune export --help` shows.

    Returns:
        `out`, `checkpoint`, and `commands` that use them.

    Raises:
        StudyError: There is no such study, or no trial is finished.
        InputError: The format is unknown, or the study's folder is not here.
    """
    from hydralv_tune.results.export.export import export_best as export

    opened = study if isinstance(study, StudyResults) else open_study(study)
    return export(
        opened.storage, opened.name, expanded_path(out), format=format, folder=opened.folder
    )


def write_report(study: StudyResults | str | Path, out: str | Path) -> Path:
    """Write a self-contained page about a study, and return its path.

    Args:
        study: A study, its folder, or the URL of its storage.
        out: Folder for `index.html` and `report.md`.

    Raises:
        StudyError: There is no such study, or no trial is finished.
        InputError: The study's folder is not here.
    """
    from hydralv_tune.results.report.report import write_report as report

    opened = study if isinstance(study, StudyResults) else open_study(study)
    return report(opened.storage, opened.name, expanded_path(out), folder=opened.folder)
