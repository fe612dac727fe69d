"""Each augmentation and loss, out and in, against what PyTorch Connectomics itself said of it.

`vectors/pytc/README.md` says how the facts were recorded; that tool is not needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pytc_vocabulary import cases, exported, foreign, place_of, voxels, words

from hydralv_tune.config.candidate import Candidate
from hydralv_tune.config.files import candidate_from_mapping, import_configuration, load_candidate
from hydralv_tune.config.validation import MISSING, value_at
from hydralv_tune.numerics.augmentation.registry import AUGMENTATIONS
from hydralv_tune.numerics.losses.registry import LOSSES
from hydralv_tune.results.export.pytc import PEER_FORMATS

VECTORS = Path(__file__).parent / "vectors" / "pytc"
FACTS: dict[str, Any] = json.loads((VECTORS / "vocabulary.json").read_text())
CASES = cases()
FOREIGN = {schema: foreign(schema) for schema in PEER_FORMATS}
ASKED = [
    (schema, case) for case in CASES for schema in PEER_FORMATS if schema in FACTS["cases"][case]
]
LOSSES_ASKED = [(schema, case) for schema, case in ASKED if case.startswith("loss")]
IMPORTS = [(schema, case) for schema in PEER_FORMATS for case in FACTS["imports"][schema]]


def value_of(candidate: Candidate, name: str, *, masked: bool) -> float:
    """Return what the loss of a candidate gives on the voxels that tool was asked about."""
    logits, targets, mask = voxels()
    place = place_of(name)
    term, kwargs = candidate.model.loss_functions[place], candidate.model.loss_kwargs[place]
    channel = slice(place, place + 1)
    inside = mask if masked else torch.ones_like(mask)
    return float(LOSSES[term](logits[:, channel], targets[:, channel], inside, **kwargs))


def test_every_augmentation_and_loss_was_asked_for() -> None:
    assert set(FACTS["cases"]) == set(CASES)
    assert {case.split()[1] for case in CASES} == {*AUGMENTATIONS, *LOSSES}
    assert {(schema, case) for schema in PEER_FORMATS for case in CASES} == set(ASKED)
    assert {(schema, case) for schema in PEER_FORMATS for case in FOREIGN[schema]} == set(IMPORTS)


@pytest.mark.parametrize(("schema", "case"), ASKED)
def test_it_is_exported_as_that_tool_took_it(schema: str, case: str) -> None:
    fact = FACTS["cases"][case][schema]
    assert fact["loads"]
    assert fact["runs"]
    assert words(exported(CASES[case], schema).mapping, case, schema) == fact["words"]


@pytest.mark.parametrize(("schema", "case"), LOSSES_ASKED)
def test_an_exported_loss_has_our_value_there_or_a_note(schema: str, case: str) -> None:
    name = case.split()[1]
    plain, masked = FACTS["cases"][case][schema]["values"]
    notes = exported(CASES[case], schema).notes
    told = any(note.startswith(f"{name}:") for note in notes)
    same = plain == pytest.approx(value_of(CASES[case], name, masked=False), rel=1e-5)
    if schema == "pytc":
        same &= masked == pytest.approx(value_of(CASES[case], name, masked=True), rel=1e-5)
    else:
        assert any("counts everywhere" in note for note in notes)
    assert same or told, (plain, masked)
    if "weight" not in case and schema == "pytc-2026-01":
        assert same


@pytest.mark.parametrize(("schema", "case"), IMPORTS)
def test_an_imported_loss_has_its_value_here_or_is_told(schema: str, case: str) -> None:
    name = case.split()[1]
    imported = import_configuration(FOREIGN[schema][case], Path("theirs.yaml"))
    candidate = candidate_from_mapping(imported.candidate, place=case)
    assert candidate.model.loss_functions[place_of(name)] == name
    plain, _ = FACTS["imports"][schema][case]
    ours = value_of(candidate, name, masked=False)
    told = any(name in entry.key for entry in imported.left_out)
    assert told or plain == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("schema", PEER_FORMATS)
def test_nothing_is_written_that_it_refused(schema: str) -> None:
    candidate = load_candidate("baseline", {"data": {"augmentation": {"preset": "all"}}})
    mapping = exported(candidate, schema).mapping
    refused = [probe for probe in FACTS["probes"][schema] if not probe["loads"]]
    for probe in refused:
        written = value_at(mapping, probe["key"])
        same_kind = isinstance(written, list) == isinstance(probe["value"], list)
        assert written is MISSING or not same_kind or written != probe["value"], probe
