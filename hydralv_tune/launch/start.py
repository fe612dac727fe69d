"""The start of a run: all that can be refused is refused before anything is written."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hydralv_tune.artifacts.writing import write_atomically
from hydralv_tune.config.errors import StudyError
from hydralv_tune.config.search_space import SearchSpace
from hydralv_tune.config.secrets import mask_passwords
from hydralv_tune.config.yaml_io import dump_yaml
from hydralv_tune.study.database import DatabaseAway, StudyGone, database_errors, gone_before
from hydralv_tune.study.earlier import FEWEST, GUIDED_SAMPLER, Guide, Lesson, lesson_of, shelf
from hydralv_tune.study.find import find_study_within
from hydralv_tune.study.mutex import StudyMutex
from hydralv_tune.study.storage_url import masked, parse_storage, without_secrets
from hydralv_tune.study.study import IDENTITY, OUT, WANTED, Study, open_if_exists, open_readonly
from hydralv_tune.study.study_folder import SPACE_FILE, Owner, check_out, claim_out

NO_LESSONS = "none"
"""What `--learn-from` is given where nothing is to be learned."""


@dataclass(frozen=True)
class Start:
    """What a run wants of its study.

    Args:
        storage: URL of the database.
        study: Name of the study.
        space: What it searches.
        out: Its folder, absolute.
        extend: Accept another space than the stored one.
        warm_start_from: Another study of the same storage to learn from.
        learn_from: Earlier studies that teach ranks, each a folder, a file or a URL, with `/STUDY`
            where a storage holds several; `none` alone for none at all. Without any, a new study
            with the sampler `tpe` learns from what ships with the package.
        wanted: Finished trials in all; None where the study says.
    """

    storage: str
    study: str
    space: SearchSpace
    out: Path
    extend: bool = False
    warm_start_from: str | None = None
    learn_from: Sequence[str] = ()
    wanted: int | None = None

    def check(self, fingerprints: Mapping[str, str]) -> None:
        """Refuse what the study, its folder or its storage do not allow; nothing is written.

        Args:
            fingerprints: Hash of each volume's content, by its name; none where they were not read.

        Raises:
            StudyError: The storage does not answer, space, volumes or folder have changed, the
                folder is another study's, or there is no study to learn from.
        """
        found = open_if_exists(self.storage, self.study)
        if found is None:
            check_out(self.out, self.study, identity=None, stored=None)
        else:
            try:
                found.check_space(self.space, extend=self.extend)
                self._check_stored(found, fingerprints)
            finally:
                found.close()
        if self.warm_start_from is not None:
            self._source().close()
        _ = self._lessons  # refused here where one cannot be read

    def open(self, fingerprints: Mapping[str, str]) -> Study:
        """Open the study, or make it, and store what is new.

        Raises:
            StudyError: As `check`: another driver may have come in between.
        """
        opened = Study.open(
            self.storage, self.study, space=self.space, create=True, extend=self.extend
        )
        mutex = StudyMutex(parse_storage(self.storage), self.study)
        try:
            with database_errors(), mutex:
                self._store(opened, fingerprints)
            with database_errors():
                self._learn(opened)
        except DatabaseAway as error:
            opened.close()
            raise StudyError(f"--storage: {opened.storage} does not answer: {error}.") from None
        except StudyGone as error:
            opened.close()
            raise gone_before(opened.storage, self.study, error) from None
        except BaseException:
            opened.close()
            raise
        finally:
            mutex.close()
        return opened

    def _store(self, opened: Study, fingerprints: Mapping[str, str]) -> None:
        """Check again and store; under the mutex."""
        self._check_stored(opened, fingerprints)
        identity = opened.identity or uuid.uuid4().hex
        opened.remember(IDENTITY, identity)
        kept = without_secrets(parse_storage(self.storage))
        try:
            claim_out(self.out, Owner(self.study, identity, kept))
            write_atomically(self.out / SPACE_FILE, dump_yaml(self.space.as_mapping()).encode())
        except OSError as error:
            raise StudyError(
                f"--out: {self.out} cannot be written ({error.strerror or error}). Make room, or "
                "name another folder."
            ) from error
        opened.remember(OUT, str(self.out))
        if self.wanted is not None:
            opened.remember(WANTED, self.wanted)
        opened.settle_volumes(fingerprints)

    def _learn(self, opened: Study) -> None:
        """Add the trials of the study to learn from; doing it again adds none twice."""
        if self.warm_start_from is not None:
            source = self._source()
            try:
                opened.import_trials(source)
            finally:
                source.close()
        stored = opened.lessons
        if [*self.learn_from] == [NO_LESSONS]:
            opened.remember_lessons([])
        elif self.learn_from:
            known = {lesson.source for lesson in stored or []}
            new = [lesson for lesson in self._lessons if lesson.source not in known]
            opened.remember_lessons([*(stored or []), *new])
        elif stored is None:
            has_use = self.space.sampler.name == GUIDED_SAMPLER and not opened.has_begun()
            opened.remember_lessons(Guide(self.space, shelf()).lessons if has_use else [])

    @cached_property
    def _lessons(self) -> list[Lesson]:
        """Return what the named earlier studies teach, read once for all checks of a start.

        Raises:
            StudyError: There is no such study, it is this one, or it teaches this space nothing.
        """
        if NO_LESSONS in self.learn_from:
            if len(self.learn_from) > 1:
                raise StudyError(
                    "--learn-from: `none` stands beside a study. Give `none` alone, or drop it."
                )
            return []
        return [self._lesson(place) for place in self.learn_from]

    def _lesson(self, place: str) -> Lesson:
        """Return what one earlier study teaches."""
        shown = f"--learn-from {mask_passwords(place)}"
        try:
            address = find_study_within(place)
            source = open_readonly(address.storage, address.name, address.folder)
        except StudyError as error:
            raise StudyError(f"{shown}: {error}") from None
        try:
            with database_errors():
                name = f"{source.name} in {source.storage}"
                lesson = lesson_of(source.space, source.trials(), name)
                is_own = source.name == self.study and source.storage == masked(
                    parse_storage(self.storage)
                )
        except DatabaseAway as error:
            raise StudyError(f"{shown}: the database does not answer: {error}.") from None
        finally:
            source.close()
        if is_own:
            raise StudyError(f"{shown}: that is this study itself. Name an earlier one.")
        if lesson is None:
            raise StudyError(
                f"{shown}: study '{source.name}' has fewer than {FEWEST} finished trials, which "
                "teach nothing. Run it further, or leave it out."
            )
        if not Guide(self.space, [lesson]).lessons:
            raise StudyError(
                f"{shown}: study '{source.name}' searches no parameter that this space does: "
                f"{', '.join(lesson.keys)}. Leave it out."
            )
        return lesson

    def _check_stored(self, study: Study, fingerprints: Mapping[str, str]) -> None:
        """Refuse other volumes and another folder than a study has."""
        study.check_volumes(fingerprints)
        check_out(self.out, self.study, identity=study.identity, stored=study.out)

    def _source(self) -> Study:
        """Open the study to learn from."""
        assert self.warm_start_from is not None
        try:
            return open_readonly(self.storage, self.warm_start_from)
        except StudyError as error:
            raise StudyError(f"--warm-start-from {self.warm_start_from}: {error}") from None
