"""The report says what the records say, on a page that needs no network."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import yaml

from hydralv_tune.artifacts.pictures import (
    COLOURS,
    choose_sections,
    draw_contact_sheet,
    draw_losses,
)
from hydralv_tune.artifacts.thumbnails import thumbnail
from hydralv_tune.config.candidate import DecodingGrid
from hydralv_tune.config.errors import InputError, StudyError
from hydralv_tune.config.search_space import space_from_mapping
from hydralv_tune.config.search_space_files import load_space
from hydralv_tune.data.volumes import Volume
from hydralv_tune.numerics.metrics.contingency import offsets
from hydralv_tune.numerics.metrics.instance_errors import (
    bootstrap,
    errors_if_corrected,
    instance_errors,
    segment_kinds,
    truth_kinds,
)
from hydralv_tune.numerics.metrics.scores import (
    adapted_rand,
    adapted_rand_foreground,
    contingency_table,
    joined,
    match_instances,
)
from hydralv_tune.numerics.metrics.scores import score_labels as score
from hydralv_tune.results.best_trial import load_best_trial
from hydralv_tune.results.report import figures
from hydralv_tune.results.report.data import Axis, compare, report_data
from hydralv_tune.results.report.limits import limits, plan_targets
from hydralv_tune.results.report.report import write_report
from hydralv_tune.results.report.sentences import next_steps
from hydralv_tune.results.scored_volumes import ScoredVolume, judge_all
from hydralv_tune.study.study import open_readonly


@pytest.fixture(scope="module")
def page(finished_study: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of the finished study."""
    return write_report(finished_study.storage, "tiny", tmp_path_factory.mktemp("report"))


def cubes(*corners: tuple[int, int, int], side: int = 4) -> np.ndarray:
    """Return (16, 32, 32) labels with one cube per corner, ids from 1."""
    labels = np.zeros((16, 32, 32), np.int32)
    for i, (z, y, x) in enumerate(corners, start=1):
        labels[z : z + side, y : y + side, x : x + side] = i
    return labels


@pytest.fixture
def wrong() -> tuple[np.ndarray, np.ndarray]:
    """Return truth and prediction with one of each: true, missed, split, merged, invented."""
    truth = cubes((1, 1, 1), (1, 1, 11), (1, 1, 21), (8, 1, 1), (8, 1, 5))
    prediction = np.zeros_like(truth)
    prediction[truth == 1] = 1
    prediction[1:3, 1:5, 21:25] = 2
    prediction[3:5, 1:5, 21:25] = 3
    prediction[(truth == 4) | (truth == 5)] = 4
    prediction[8:12, 20:24, 20:24] = 5
    return truth, prediction


def test_what_the_study_searches_lies_beside_and_is_what_a_command_names(
    page: Path, finished_study: Any
) -> None:
    with closing(open_readonly(finished_study.storage, "tiny")) as study:
        written = load_space(page.parent / "space.yaml")
        # Recipes come from their files where a study does not hold them.
        assert {**written.as_mapping(), "recipes": {}} == study.space.as_mapping()
    runs = re.findall(r"^hydralv-tune run (\S+)", (page.parent / "report.md").read_text(), re.M)
    assert set(runs) == {str(page.parent / "space.yaml")}


def test_what_was_trained_on_and_what_was_held_out_stand_beside_each_other(page: Path) -> None:
    text = (page.parent / "report.md").read_text()
    assert re.search(r"^- Small \([\d,]+ to [\d,]+ voxels, .* nm³\): \d of \d match", text, re.M)
    assert "## Trained on and held out" in text
    assert "how it does elsewhere is not known" in text
    rows = re.findall(r"^\| adapted Rand error \| (\S+) \| (\S+) \|$", text, re.M)
    assert [(trained != "–", held_out) for trained, held_out in rows] == [(True, "–")]
    assert 'id="held-out"' in page.read_text()


def test_each_verdict_is_told_from_the_others(wrong: Any) -> None:
    truth, prediction = wrong
    table = contingency_table(prediction=prediction, truth=truth)
    assert truth_kinds(table) == {
        1: "true", 2: "missed", 3: "split", 4: "merged", 5: "merged",
    }  # fmt: skip
    assert segment_kinds(table) == {
        1: "true", 2: "split", 3: "split", 4: "merged", 5: "invented",
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_worth_of_mending_is_what_mending_really_brings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = cubes((1, 1, 1), (1, 1, 11), (1, 10, 10), (8, 1, 1), (8, 1, 5))
    prediction = np.where(rng.random(truth.shape) < 0.6, np.roll(truth, 1, axis=2), 0)
    prediction[truth == 2] = 0
    prediction[12:15, 20:24, 20:24] = 9
    table = contingency_table(prediction=prediction, truth=truth)
    before, before_fg = adapted_rand(table).error, adapted_rand_foreground(table).error
    verdicts = instance_errors(table)
    assert {v.truth_id for v in verdicts if v.truth_id} == set(range(1, 6))
    for verdict in verdicts:
        mended = prediction.copy()
        if verdict.truth_id is None:
            mended[np.isin(mended, verdict.segment_ids)] = 0
        else:
            mended[truth == verdict.truth_id] = 99
        after = contingency_table(prediction=mended, truth=truth)
        told = (before - verdict.worth, before_fg - verdict.worth_foreground)
        assert told == pytest.approx(
            (adapted_rand(after).error, adapted_rand_foreground(after).error), abs=1e-12
        )
        assert errors_if_corrected(table, [verdict]) == pytest.approx(told, abs=1e-12)


def test_mending_everything_leaves_no_error(wrong: Any) -> None:
    truth, prediction = wrong
    table = contingency_table(prediction=prediction, truth=truth)
    assert errors_if_corrected(table, instance_errors(table)) == pytest.approx(
        (0.0, 0.0), abs=1e-12
    )


def test_interval_holds_the_score_and_a_perfect_one_is_a_point(wrong: Any) -> None:
    truth, prediction = wrong
    table = contingency_table(prediction=prediction, truth=truth)
    spans = bootstrap(table, resamples=400)
    figures = score(prediction=prediction, truth=truth).as_dict()
    for name, (low, high) in spans.items():
        assert 0.0 <= low < high <= 1.0
        assert low <= figures[name] <= high
    perfect = bootstrap(contingency_table(prediction=truth, truth=truth), resamples=50)
    assert perfect["adapted_rand_error"] == pytest.approx((0.0, 0.0), abs=1e-12)
    assert perfect["f1_iou50"] == (1.0, 1.0)


def test_interval_is_wider_for_fewer_instances() -> None:
    rng = np.random.default_rng(0)
    corners = [(z, y, x) for z in (0, 5, 10) for y in range(0, 28, 5) for x in range(0, 28, 5)]
    truth = cubes(*corners)
    prediction = np.where(np.isin(truth, rng.choice(len(corners), 60) + 1), truth, 0)
    few = np.where(truth <= 12, truth, 0)
    wide = bootstrap(contingency_table(prediction=np.where(few, prediction, 0), truth=few))
    slim = bootstrap(contingency_table(prediction=prediction, truth=truth))
    span = {n: np.ptp(s["f1_iou50"]) for n, s in (("wide", wide), ("slim", slim))}
    assert span["wide"] > 1.5 * span["slim"]


def test_two_volumes_with_the_same_ids_add_up_and_keep_them(wrong: Any) -> None:
    truth, prediction = wrong
    table = contingency_table(prediction=prediction, truth=truth)
    both = joined([table, table])
    assert adapted_rand(both).error == pytest.approx(adapted_rand(table).error, abs=1e-3)
    assert match_instances(both).f1 == match_instances(table).f1
    assert offsets([table, table]) == ([0, 5], [0, 5])
    volume = Volume("v", truth, truth, None, None)
    judged = judge_all([ScoredVolume(volume, prediction)] * 2)
    kinds = [(i.part, i.error.truth_id) for i in judged.instances if i.error.truth_id]
    assert sorted(kinds) == [(p, i) for p in (0, 1) for i in range(1, 6)]


def test_what_limits_the_score_is_ranked_by_what_mending_brings(wrong: Any) -> None:
    truth, prediction = wrong
    table = contingency_table(prediction=prediction, truth=truth)
    found = limits(
        table, instance_errors(table), metric="adapted_rand_error",
        recipes=["foreground_weighted", "plan_quick_win"],
    )  # fmt: skip
    assert {limit.kind: limit.count for limit in found} == {
        "merged": 2, "missed": 1, "split": 1, "invented": 1,
    }  # fmt: skip
    worths = [limit.worth for limit in found]
    assert worths == sorted(worths, reverse=True)
    assert found[0].kind == "merged"
    assert found[0].recipe == "plan_quick_win"
    assert next(limit for limit in found if limit.kind == "invented").worth == 0


def test_targets_tell_what_is_missing() -> None:
    told = {t.label: t for t in plan_targets(
        {"adapted_rand_error": 0.06, "adapted_rand_precision": 0.96}, {"edt": 0.004}
    )}  # fmt: skip
    assert not told["adapted Rand error"].met
    assert told["adapted Rand error"].distance == pytest.approx(0.01)
    assert told["precision"].met
    assert told["precision"].distance == 0
    assert told["distance loss"].met
    assert told["recall"].now is None
    assert not told["recall"].met


def test_thresholds_at_the_end_of_their_grid_come_with_a_grid_that_can_be_pasted(
    finished_study: Any, tmp_path: Path
) -> None:
    def axis(name: str, edge: str, bounds: tuple[float, float], *values: float | None) -> Axis:
        return Axis(name, name, str(values[0]), "", "", edge, values, bounds)

    with load_best_trial(finished_study.storage, "tiny", None) as best:
        data = report_data(best, tmp_path)
    axes = [
        axis("contour_threshold.seed", "low", (0.0, 1.0), 0.3, 0.6, None),
        axis("contour_threshold.foreground", "", (0.0, 1.0), None),
        axis("distance_threshold.seed", "high", (-1.0, 1.0), 0.0, 0.5),
        axis("min_seed_size", "low", (0.0, np.inf), 2, 8),
        axis("min_instance_size", "high", (0.0, np.inf), 16, 32),
        axis("binary_threshold.seed", "", (0.0, 1.0), 0.5, 0.7),
    ]
    widen = [s for s in next_steps(replace(data, axes=axes)) if s.title.startswith("Widen")]
    assert [step.title for step in widen] == ["Widen 4 thresholds"]
    assert widen[0].then.startswith("hydralv-tune run ")
    assert widen[0].then.endswith(" --extend")
    pasted = DecodingGrid.model_validate(yaml.safe_load(widen[0].text)["decoding"])
    assert pasted.axes == {
        "contour_threshold.seed": (0.15, 0.3, 0.6, None),
        "contour_threshold.foreground": (None,),
        "distance_threshold.seed": (0.0, 0.5, 0.75),
        "min_seed_size": (1, 2, 8),
        "min_instance_size": (16, 32, 64),
    }
    assert not [
        step for step in next_steps(replace(data, axes=axes[-1:])) if step.title.startswith("Widen")
    ]


@pytest.mark.parametrize(("dropout", "wider"), [(0.0, []), (0.2, ["[0, 0.3]"])])
def test_a_range_is_widened_where_there_is_something_beyond(
    finished_study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float,
    wider: list[str],
) -> None:  # fmt: skip
    with load_best_trial(finished_study.storage, "tiny", None) as best:
        data = report_data(best, tmp_path)
    parameters = {"model.dropout": {"float": [0.0, 0.2]}}
    space = space_from_mapping({"base": "smoke", "parameters": parameters})
    monkeypatch.setattr(data.best.study, "_space", space)
    view = replace(data.best.view, params={"model.dropout": dropout})
    shown = replace(data, axes=[], best=replace(data.best, view=view))
    found = [step.text for step in next_steps(shown) if step.title.startswith("Widen")]
    assert [text.split("float: ")[1].rstrip("}") for text in found] == wider


def test_parameters_of_one_ending_have_a_bar_each() -> None:
    shares = {"data.augmentation.affine.enabled": 0.6, "data.augmentation.intensity.enabled": 0.4}
    (bars,) = figures.importances(shares).data
    assert sorted(bars.y) == ["affine enabled", "intensity enabled"]


def test_comparison_knows_which_way_is_better() -> None:
    rows = {c.label: c for c in compare(
        {"adapted_rand_error": 0.4, "f1_iou50": 0.5, "missed": [1, 2]},
        {"adapted_rand_error": 0.1, "f1_iou50": 0.4, "missed": []},
    )}  # fmt: skip
    assert rows["adapted Rand error"].verdict == "better"
    assert rows["F1 at IoU 0.5"].verdict == "worse"
    assert (rows["missed"].change, rows["missed"].verdict) == (-2, "better")


class _Links(HTMLParser):
    """Collects every address that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.followed: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take in the addresses of a tag."""
        self.images += tag == "img"
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action") and value:
                (self.followed if tag == "a" else self.links).append(value)


def test_page_needs_no_network(page: Path) -> None:
    links = _Links()
    links.feed(page.read_text())
    assert all(link.startswith(("#", "data:")) for link in links.links)
    assert "default-src 'none'" in page.read_text()


def test_the_files_of_the_best_trial_are_links_that_open(page: Path) -> None:
    links = _Links()
    links.feed(page.read_text())
    files = [(page.parent / unquote(a)).resolve() for a in links.followed if a[0] != "#"]
    assert {"segmentation_0.h5", "sweep.parquet", "best.ckpt"} <= {file.name for file in files}
    assert all(file.is_file() for file in files)
    written = (page.parent / "report.md").read_text()
    assert all(f"]({a})" in written for a in links.followed if a[0] != "#")


def test_page_says_what_the_record_says(page: Path, finished_study: Any) -> None:
    text = page.read_text()
    study = open_readonly(finished_study.storage, "tiny")
    best = study.best()
    metrics = best.user_attrs["metrics"]
    study.close()
    assert f"Trial {best.number} finds {metrics['matched_iou50']} of 5 instances" in text
    for key in ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50", "voi_split"):
        assert f"{metrics[key]:.4f}" in text
    for anchor in ("targets", "history", "comparison", "thresholds", "instances", "limits"):
        assert f'id="{anchor}"' in text
    for figure in ("history", "parallel", "sizes", "curves"):
        assert f'id="figure-{figure}"' in text
    assert "3 complete, 1 pruned early, 1 failed" in text


def test_a_reason_cannot_put_markup_into_the_page(page: Path) -> None:
    text = page.read_text()
    assert "&lt;b&gt;at step 3&lt;/b&gt;" in text
    assert "<b>at step 3</b>" not in text


def test_every_wrong_instance_has_a_picture(page: Path) -> None:
    text = page.read_text()
    cards = re.findall(r'<article class="card".*?</article>', text, re.S)
    told = sum(int(n) for n in re.findall(r"<summary>(\d+) (?!trials)\w+</summary>", text))
    assert cards
    assert len(cards) == told
    assert all("data:image/webp;base64," in card for card in cards)
    assert len(list(page.parent.glob("instances/*.webp"))) == told


def test_markdown_names_only_pictures_that_are_there(page: Path) -> None:
    text = (page.parent / "report.md").read_text()
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert "contact_sheet.png" in named
    assert all((page.parent / name).stat().st_size > 100 for name in named)
    for heading in ("What limits the score", "targets", "The search", "baseline", "plateau"):
        assert re.search(rf"^## .*{heading}", text, re.M), heading


def test_report_is_written_though_the_volumes_are_gone(finished_study: Any, tmp_path: Path) -> None:
    copied = finished_study.copied_to(tmp_path / "copy")
    storage = copied.storage
    record = copied.folder_of_best() / "record.json"
    record.write_text(record.read_text().replace(str(finished_study.folder / "im.h5"), "gone.h5"))
    text = write_report(storage, "tiny", tmp_path / "report").read_text()
    assert "The instances are not shown one by one" in text
    assert "gone.h5" in text


def test_study_that_does_not_exist_leaves_nothing(finished_study: Any, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="tinny"):
        write_report(finished_study.storage, "tinny", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_segmentation_is_decoded_again_where_its_file_is_gone(
    finished_study: Any, tmp_path: Path
) -> None:
    from hydralv_tune.results.best_trial import load_best_trial
    from hydralv_tune.results.scored_volumes import scored_volumes

    copied = finished_study.copied_to(tmp_path / "copy")
    storage = copied.storage
    with load_best_trial(storage, "tiny") as best:
        kept = scored_volumes(best)[0].prediction
        (best.folder / "segmentation_0.h5").unlink()
        assert np.array_equal(scored_volumes(best)[0].prediction, kept)
        best.record.volumes[0]["fingerprint"] = "0" * 16
        with pytest.raises(InputError, match="fingerprint"):
            scored_volumes(best)


def test_contact_sheet_shows_the_colours_of_what_went_wrong(wrong: Any, tmp_path: Path) -> None:
    from matplotlib.image import imread

    truth, prediction = wrong
    image = np.random.default_rng(0).integers(90, 110, truth.shape, dtype=np.uint8)
    path = draw_contact_sheet(
        image=image, truth=truth, prediction=prediction, mask=None, path=tmp_path / "s.png",
        title="a sheet",
    )  # fmt: skip
    picture = (imread(path)[..., :3] * 255).astype(int)
    for verdict, colour in COLOURS.items():
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        near = (np.abs(picture - wanted).max(axis=-1) < 8).sum()
        assert near > 40, verdict


def test_sections_that_show_faults_come_first(wrong: Any) -> None:
    truth, prediction = wrong
    table = contingency_table(prediction=prediction, truth=truth)
    verdicts = truth_kinds(table), segment_kinds(table)
    one = choose_sections(truth, prediction, *verdicts, count=2)
    assert any(1 <= z < 5 for z in one)
    assert any(8 <= z < 12 for z in one)


@pytest.mark.parametrize("size", [(30.0, 8.0, 8.0), None])
def test_thumbnail_shows_three_planes(wrong: Any, size: Any) -> None:
    truth, prediction = wrong
    content = thumbnail(
        image=truth.astype(np.uint8), truth=truth, prediction=prediction, truth_ids=[3],
        segment_ids=[2, 3], colour=COLOURS["split"], voxel_size_nm=size, side=60,
    )  # fmt: skip
    assert content[:4] == b"RIFF"
    assert content[8:12] == b"WEBP"
    with pytest.raises(ValueError, match="neither truth"):
        thumbnail(image=truth, truth=truth, prediction=prediction, truth_ids=[77],
                  segment_ids=[], colour="#000000")  # fmt: skip


def test_losses_are_drawn_even_where_some_are_missing(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "losses": {"total": 1.0}, "metrics": {"f1_iou50": None}},
            {"epoch": 2, "losses": {"total": float("nan"), "edt": 0.1}, "metrics": {}}]  # fmt: skip
    assert draw_losses(rows, tmp_path / "l.png").stat().st_size > 1000
    assert draw_losses([], tmp_path / "e.png").stat().st_size > 1000


@pytest.mark.parametrize("width", [400, 1280])
def test_page_fits_a_phone_and_a_desk_without_an_error(
    page: Path, chromium: Any, width: int
) -> None:
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    chromium.get_log("browser")
    chromium.get(page.as_uri())
    drawn = (
        "return [...document.querySelectorAll('[id^=figure-]')].map(f => !!f.querySelector('svg'))"
    )
    assert all(chromium.execute_script(drawn))
    assert len(chromium.execute_script(drawn)) >= 4
    widths = chromium.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1]
    spilling = chromium.execute_script(
        "return [...document.querySelectorAll('main section > *')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth).length"
    )
    assert spilling == 0
    broken = chromium.execute_script(
        "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    )
    assert broken == 0
    loaded = chromium.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
        ".filter(n => !n.startsWith('data:') && !n.startsWith('blob:'))"
    )
    assert loaded == []
    errors = [e for e in chromium.get_log("browser") if e["level"] == "SEVERE"]
    assert errors == []


CONTRAST = """
const base = matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
const mixed = (over, under) => under.map((c, i) => over[3] * over[i] + (1 - over[3]) * c);
const colour = text => {
  const [red, green, blue, alpha] = text.match(/[\\d.]+/g).map(Number);
  return [red, green, blue, alpha ?? 1];
};
const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = rgb => rgb.reduce(
  (sum, c, i) => sum + linear(c / 255) * [0.2126, 0.7152, 0.0722][i], 0);
const ground = element => {
  const layers = [];
  for (let at = element; at; at = at.parentElement) {
    layers.unshift(colour(getComputedStyle(at).backgroundColor));
  }
  return layers.reduce((under, over) => mixed(over, under), base);
};
const faint = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const element = node.parentElement;
  const box = element.getBoundingClientRect();
  const style = getComputedStyle(element);
  if (!node.data.trim() || !box.width || !box.height || style.visibility === "hidden") continue;
  const ink = element.closest("svg") ? style.fill : style.color;
  if (element.closest("script,style,noscript") || !ink.startsWith("rgb")) continue;
  const under = ground(element);
  const [one, other] = [luminance(mixed(colour(ink), under)), luminance(under)];
  const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${element.tagName} ${node.data.trim()}`);
}
return faint;
"""
"""The texts whose contrast against what lies under them is below what WCAG asks of text, 4.5."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(page: Path, chromium: Any, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        chromium.get(page.as_uri())
        assert chromium.execute_script("return document.body.innerText.length") > 1000
        assert chromium.execute_script(CONTRAST) == []
    finally:
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_prediction_of_nothing_is_all_missed(tmp_path: Path) -> None:
    truth = cubes((1, 1, 1), (8, 10, 10))
    nothing = np.zeros_like(truth)
    table = contingency_table(prediction=nothing, truth=truth)
    verdicts = instance_errors(table)
    assert [v.kind for v in verdicts] == ["missed", "missed"]
    assert errors_if_corrected(table, verdicts) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert bootstrap(table, resamples=20)["adapted_rand_error"] == (1.0, 1.0)
    found = limits(table, verdicts, metric="adapted_rand_error", recipes=["foreground_weighted"])
    assert [(limit.kind, limit.recipe) for limit in found] == [("missed", "foreground_weighted")]
    path = draw_contact_sheet(
        image=truth, truth=truth, prediction=nothing, mask=None, path=tmp_path / "s.png"
    )
    assert path.stat().st_size > 1000


def test_a_loose_outline_is_told_by_its_direction() -> None:
    truth = cubes((4, 4, 4), (4, 4, 20), side=6)
    core = truth.copy()
    core[4], core[:, 4] = 0, 0
    halo = truth.copy()
    halo[10, 4:10, 4:10], halo[10, 4:10, 20:26] = 1, 2
    halo[4:10, 10, 4:10], halo[4:10, 10, 20:26] = 1, 2
    recipes = ["foreground_weighted", "plan_focal"]
    for prediction, recipe in ((core, "foreground_weighted"), (halo, "plan_focal")):
        table = contingency_table(prediction=prediction, truth=truth)
        found = limits(
            table, instance_errors(table), metric="adapted_rand_error_foreground", recipes=recipes
        )
        assert [(limit.kind, limit.count, limit.recipe) for limit in found] == [
            ("loose", 2, recipe)
        ]
