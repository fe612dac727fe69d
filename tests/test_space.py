# ruff: noqa: E501 (a table of faults reads best with a fault on a line)
"""Search spaces: every rule with its message, what a trial becomes, what a study stores."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydralv_tune.cli.main import exit_code
from hydralv_tune.config.candidate_rules import KnownBlocks
from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.files import load_candidate, whole_candidate
from hydralv_tune.config.search_space import (
    Objective,
    SearchSpace,
    objective_value,
    space_from_mapping,
    thresholds_yaml,
)
from hydralv_tune.config.search_space_files import check_file, explain_file, load_space, with_fixed
from hydralv_tune.config.search_space_rules import drawn
from hydralv_tune.config.validation import merged, value_at
from hydralv_tune.config.yaml_io import parse_yaml
from hydralv_tune.data.volumes import write_array
from hydralv_tune.trial.scoring.sweep.sweep import checked_axes

REPOSITORY = Path(__file__).parents[1]
SPACES = sorted(path.stem for path in (REPOSITORY / "search_spaces").glob("*.yaml"))
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a space and gives its path."""

    def written(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return written


@pytest.fixture(scope="module")
def hydra() -> SearchSpace:
    """Return the space of large vesicles."""
    return load_space("hydra_lv")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SearchSpace:
    """Return a space with every kind of parameter."""
    path = tmp_path_factory.mktemp("spaces") / "small.yaml"
    path.write_text(
        """
base: tiny
fixed: {optimization: {max_epochs: 7}, system: {seed: 3}}
recipes:
  tiny:
    model: {filters: [8, 16, 24], loss_weights: [1, 1, 1, 1, 1]}
    optimization: {optimizer: {lr: 3e-3}, scheduler: {warmup_epochs: 1}}
  wide: {model: {filters: [16, 32]}, optimization: {optimizer: {lr: 2e-3}, max_epochs: 99}}
warm_starts: [tiny, wide]
parameters:
  model.architecture: {choice: [rsunet, monai_unet]}
  model.filters: {choice: [[8, 16, 24], [16, 32]], when: {model.architecture: [rsunet]}}
  model.norm: {choice: [batch, instance], when: {model.filters: [[16, 32]]}}
  model.num_res_units: {int: [0, 4], step: 2, when: {model.architecture: [monai_unet]}}
  optimization.optimizer.lr: {float: [1e-3, 1e-2], log: true}
  optimization.ema.enabled: {choice: [true, false]}
  loss_set:
    choice:
      plan: {model: {loss_weights: [1, 1, 1, 1, 1]}}
      heavy: {model: {loss_weights: [2, 2, 1, 1, 0.5]}}
"""
    )
    return load_space(path)


# --- Shipped spaces ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_every_shipped_space_is_valid_and_survives_the_study_attributes(name: str) -> None:
    space = load_space(name)
    assert space.name == name
    stored = json.loads(json.dumps(space.as_mapping()))
    again = space_from_mapping(stored)
    assert again == space
    assert again.digest() == space.digest()
    assert again.differences(space) == []
    generator = random.Random(1)
    for _ in range(20):
        params = json.loads(json.dumps(drawn(space, generator)))
        assert again.candidate(params) == space.candidate(params)


@pytest.mark.parametrize("name", SPACES)
def test_a_warm_start_holds_the_values_of_its_recipe(name: str) -> None:
    space = load_space(name)
    assert space.warm_starts
    for recipe in space.warm_starts:
        start = space.warm_start(recipe)
        whole = space.candidate(start.params, start.overrides).as_mapping()
        assert whole == space.candidate({}, start.overrides).as_mapping()
        for key, value in start.params.items():
            assert space.is_active(key, start.params)
            json.dumps(value)


def test_hydra_lv_searches_what_decides(hydra: SearchSpace) -> None:
    assert set(hydra.parameters) >= {
        "optimization.optimizer.lr", "optimization.optimizer.weight_decay",
        "optimization.scheduler.warmup_epochs", "model.loss_weights",
        "model.loss_balancing.strategy", "loss_set", "data.augmentation.preset",
        "model.architecture", "model.filters", "model.deep_supervision", "model.dropout",
        "optimization.ema.enabled", "data.image_transform.normalize",
        "data.sampling.foreground_share", "data.label_transform.edt_voxel_size",
    }  # fmt: skip
    losses = hydra.parameters["loss_set"].choice
    assert isinstance(losses, dict)
    alphas = {
        kwargs["alpha"] for block in losses.values() for kwargs in block["model"]["loss_kwargs"]
        if "gamma" in kwargs
    }  # fmt: skip
    assert min(alphas) < 0.5 < max(alphas), "focal loss is searched both ways"


def test_hydra_lv_sweeps_every_threshold_and_the_baselines_among_them(hydra: SearchSpace) -> None:
    axes = checked_axes(hydra.decoding)
    size = 1
    for values in axes.values():
        size *= len(values)
    assert size >= 20_000
    for name, value in load_candidate("baseline").test.decoding[0].kwargs.items():
        if name == "min_seed_size":
            assert value in axes[name]
            continue
        seed, foreground = value
        assert seed in axes[f"{name}.seed"]
        # 13.1 is off, which the sweep holds as infinity.
        assert (foreground if foreground <= 1 else float("inf")) in axes[f"{name}.foreground"]


def test_smoke_is_small_and_has_two_architectures() -> None:
    space = load_space("smoke")
    networks = space.parameters["network"].choice
    assert isinstance(networks, dict)
    assert len({block["model"]["architecture"] for block in networks.values()}) >= 2
    assert space.budget.trials == 8
    for name in space.warm_starts:
        start = space.warm_start(name)
        candidate = space.candidate(start.params, start.overrides)
        assert max(candidate.model.filters) <= 64
        assert candidate.data.patch_size[0] * candidate.data.patch_size[1] ** 2 <= 24 * 64 * 64


# --- Trials ---------------------------------------------------------------------------------


def test_a_trial_is_base_then_recipe_then_values_then_fixed(small: SearchSpace) -> None:
    base = load_candidate("baseline")
    start = small.warm_start("wide")
    assert start.params == {
        "model.architecture": "rsunet", "model.filters": "[16, 32]", "model.norm": "batch",
        "optimization.optimizer.lr": 2e-3, "optimization.ema.enabled": True, "loss_set": "plan",
    }  # fmt: skip
    candidate = small.candidate(start.params, start.overrides)
    assert candidate.model.filters == (16, 32)
    assert candidate.optimization.max_epochs == 7, "fixed wins over a recipe"
    assert candidate.system.seed == 3
    assert candidate.data == base.data
    lower = small.candidate({**start.params, "optimization.optimizer.lr": 5e-3}, start.overrides)
    assert lower.optimization.optimizer.lr == 5e-3, "a sampled value wins over a recipe"
    heavy = small.candidate({"loss_set": "heavy"})
    assert heavy.model.loss_weights == (2.0, 2.0, 1.0, 1.0, 0.5)


def test_what_the_command_line_fixes_holds_for_every_trial(small: SearchSpace) -> None:
    fixed = with_fixed(small, {"optimization": {"max_epochs": 9}, "data": {"pad_size": [0, 0, 0]}})
    start = fixed.warm_start("wide")
    candidate = fixed.candidate(start.params, start.overrides)
    assert candidate.optimization.max_epochs == 9
    assert candidate.system.seed == 3, "the file's own still holds"
    assert candidate.data.pad_size == (0, 0, 0)
    assert small.fixed["optimization"]["max_epochs"] == 7, "the space itself is left as it was"
    with pytest.raises(
        ConfigError, match=r"--set: parameters.optimization.optimizer.lr is searched"
    ):
        with_fixed(small, {"optimization": {"optimizer": {"lr": 1e-3}}})
    with pytest.raises(ConfigError, match=r"--set: optimization.max_epoch is no key.*max_epochs'"):
        with_fixed(small, {"optimization": {"max_epoch": 1}})
    with pytest.raises(ConfigError, match=r"--set: .*max_epochs is 1, so the warm-up"):
        with_fixed(small, {"optimization": {"max_epochs": 1}})


def test_a_condition_reaches_through_another(small: SearchSpace) -> None:
    wide = {"model.architecture": "rsunet", "model.filters": "[16, 32]"}
    assert small.is_active("model.norm", wide)
    assert not small.is_active("model.norm", {**wide, "model.filters": "[8, 16, 24]"})
    assert not small.is_active("model.norm", {**wide, "model.architecture": "monai_unet"})
    assert not small.is_active("model.norm", {})
    assert small.is_active("model.architecture", {})
    idle = {"model.architecture": "monai_unet", "model.norm": "instance"}
    assert small.candidate(idle).model.norm is None, "a value without its condition does nothing"


def test_every_drawn_point_is_a_candidate(small: SearchSpace) -> None:
    generator = random.Random(2)
    for _ in range(50):
        params = drawn(small, generator)
        candidate = small.candidate(params).as_mapping()
        for key, value in params.items():
            if key != "loss_set":
                decoded = small.parameters[key].decoded(value)
                assert value_at(candidate, key) == decoded


def test_true_is_not_one() -> None:
    parameter = space_from_mapping(
        {"parameters": {"optimization.ema.enabled": {"choice": [True, 1]}}}
    ).parameters["optimization.ema.enabled"]
    assert parameter.decoded(True) is True
    assert parameter.decoded(1) == 1
    assert parameter.decoded(1) is not True


def test_an_unknown_parameter_or_choice_is_told(small: SearchSpace) -> None:
    with pytest.raises(ConfigError, match=r"Unknown parameter 'optimization.optimizer.l'.*'optim"):
        small.candidate({"optimization.optimizer.l": 1})
    with pytest.raises(ConfigError, match="'rsunett' is none of the choices"):
        small.candidate({"model.architecture": "rsunett"})


def test_a_sampled_network_drops_the_weights_of_the_base(write: Write, tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text("model: {external_weights_path: best.ckpt}\n")
    space = load_space(
        write(
            "base: tuned.yaml\n"
            "parameters: {model.filters: {choice: [[32, 64, 128, 256, 512], [8, 16]]}}\n"
        )
    )
    kept = space.candidate({"model.filters": "[32, 64, 128, 256, 512]"})
    assert kept.model.external_weights_path == "best.ckpt"
    assert space.candidate({"model.filters": "[8, 16]"}).model.external_weights_path is None


# --- Identity ---------------------------------------------------------------------------------


def test_the_digest_is_of_what_a_trial_means(small: SearchSpace) -> None:
    mapping = small.as_mapping()

    def digest(change: dict[str, Any]) -> str:
        return space_from_mapping(merged(mapping, change)).digest()

    assert digest({"budget": {"trials": 500}}) == small.digest()
    assert digest({"sampler": {"name": "random"}}) == small.digest()
    assert digest({"name": "other"}) == small.digest()
    for change in (
        {"fixed": {"system": {"seed": 4}}},
        {"objective": {"metric": "f1_iou50"}},
        {"decoding": {"grid": {"min_seed_size": [3]}}},
        {"parameters": {"optimization.optimizer.lr": {"float": [1e-3, 1e-1]}}},
        {"recipes": {"tiny": {"optimization": {"optimizer": {"weight_decay": 0.5}}}}},
    ):
        assert digest(change) != small.digest(), change


def test_differences_are_lines_a_person_can_read(small: SearchSpace) -> None:
    other = space_from_mapping(
        merged(
            small.as_mapping(),
            {"parameters": {"optimization.optimizer.lr": {"float": [1e-3, 1e-1]}},
             "fixed": {"system": {"seed": 4}}, "budget": {"trials": 3}},
        )
    )  # fmt: skip
    assert small.differences(other) == [
        "fixed.system.seed: 3 -> 4",
        "parameters.optimization.optimizer.lr.float: [0.001, 0.01] -> [0.001, 0.1]",
    ]


# --- Faults -----------------------------------------------------------------------------------

FAULTS = [
    ("parameter: {}", "parameter is no key of a search space. Did you mean 'parameters'"),
    ("base: basline", "basline: there is no such file.*Did you mean 'baseline'"),
    ("warm_starts: [plan_focl]", "Did you mean 'plan_focal'"),
    ("warm_starts: [smoke, smoke]", "a name stands twice"),
    ("budget: {trials: 0}", "budget.trials is 0, but it must be at least 1"),
    ("sampler: {name: tpee}", "sampler.name is 'tpee'.*Did you mean 'tpe'"),
    ("pruner: {name: wilcoxon}", "'wilcoxon', but it compares at least 4 folds. Set fixed.data.split"),
    ("parameters: {data.split.kind: {choice: [none, holdout]}}",
     "the value 'holdout' has the data.split holdout, but the base has none"),
    ("warm_starts: [half]\nrecipes: {half: {data: {split: {kind: holdout}}}}",
     "warm_starts: 'half' has the data.split holdout, but the base has none"),
    ("objective: {metric: f1}", "objective.metric is 'f1', but it must be one of"),
    ("fixed: {model: {filtres: [8, 16]}}", "model.filtres is no key .*'model.filters'"),
    ("fixed: {optimization: {max_epochs: 50}}", "base 'baseline' with `fixed`: .*warm-up would"),
    ("parameters: {optimization.optimizer.learning_rate: {float: [1e-5, 1e-3]}}",
     "learning_rate is no key of a candidate. Did you mean 'optimization.optimizer.lr'"),
    ("parameters: {optimization: {optimizer: {lr: {float: [1e-5, 1e-3]}}}}",
     "parameters.optimization.optimizer"),
    ("parameters: {optimization.optimizer.lr: {float: [0, 1e-3], log: true}}",
     r"optimizer.lr.float\[0\] is 0.0, but a log range must start above 0. Try 1e-5"),
    ("parameters: {optimization.optimizer.lr: {float: [1e-3, 1e-5]}}", "lowest must be below"),
    ("parameters: {optimization.optimizer.lr: {float: [1e-3]}}", r"float\[1\] is missing"),
    ("parameters: {optimization.optimizer.lr: {}}", "has 0 of float, int and choice"),
    ("parameters: {optimization.optimizer.lr: {float: [1, 2], choice: [3]}}", "has 2 of float"),
    ("parameters: {optimization.optimizer.lr: {float: [1e-5, 20.0]}}",
     "the value 20.0 gives no valid candidate: optimization.optimizer.lr is 20.0, but"),
    ("parameters: {optimization.scheduler.warmup_epochs: {int: [0, 500]}}",
     "the value 500 gives no valid candidate: optimization.scheduler.warmup_epochs is 500"),
    ("parameters: {optimization.scheduler.warmup_epochs: {int: [0, 45], step: 10}}",
     r"no multiple of step 10. Try \[0, 40\]"),
    ("parameters: {optimization.optimizer.lr: {float: [1, 2], step: 1}}", "a step belongs to"),
    ("parameters: {optimization.optimizer.lr: {float: [1e-7, 1e-3], log: true}}",
     "min_lr is 1e-06, but optimization.optimizer.lr is 1e-07"),
    ("parameters: {model.architecture: {choice: [rsunet, mednxt]}}",
     "the value 'mednxt' gives no valid candidate: model.architecture is 'mednxt'.*'mednext'"),
    ("parameters: {model.architecture: {choice: []}}", "it needs at least one value"),
    ("parameters: {model.norm: {choice: [batch, batch]}}", "a value stands twice"),
    ("parameters: {model.norm: {choice: [batch], log: true}}", "belong to a range"),
    ("parameters: {model.mednext_size: {choice: [S, B]}}", "mednext_size is S, but it has no effect"),
    ("parameters: {model.mednext_size: {choice: [S], when: {model.architecture: [mednext]}}}",
     "a condition names a parameter that stands before it"),
    ("parameters: {model.architecture: {choice: [rsunet, mednext]}, model.mednext_size: {choice: [S],"
     " when: {model.architecture: [mednxt]}}}", "when.model.architecture is 'mednxt', but"),
    ("parameters: {losses: {choice: {a: {model: {loss_weight: [1]}}}}}",
     "losses.choice.a: model.loss_weight is no key .*'model.loss_weights'"),
    ("parameters: {losses: {choice: {a: {}}}}", "a named choice says something"),
    ("parameters: {losses: {choice: {a: {model: {loss_weights: [1]}}}}}",
     "the value 'a' gives no valid candidate: model.loss_weights"),
    ("fixed: {optimization: {optimizer: {lr: 1e-3}}}\n"
     "parameters: {optimization.optimizer.lr: {float: [1e-5, 1e-3]}}",
     "is searched, but fixed.optimization.optimizer.lr is 0.001 and wins"),
    ("fixed: {model: {external_weights_path: a.ckpt}}\n"
     "parameters: {model.filters: {choice: [[8, 16], [16, 32]]}}",
     "searches the network, which voids the weights"),
    ("warm_starts: [plan_mednext_s]\nparameters: {model.architecture: {choice: [rsunet]}}",
     "'plan_mednext_s' has model.architecture = 'mednext', but the space searches one of 'rsunet'"),
    ("warm_starts: [baseline]\nparameters: {optimization.optimizer.lr: {float: [1e-3, 1e-2]}}",
     r"'baseline' has optimization.optimizer.lr = 0.0001, but the space searches in \[0.001, 0.01\]"),
    ("warm_starts: [baseline]\nparameters: {s: {choice: {a: {model: {dropout: 0.3}}}}}",
     "'baseline' has s = 'none of the named choices'"),
    ("decoding: {decoder: decode_y}", "no decoder has that name"),
    ("decoding: {grid: {binary_threshold: [0.3]}}", "has no such axis"),
    ("decoding: {grid: {contour_threshold: {seed: [-1]}}}", "must be at least 0"),
    ("decoding: {decoder: decode_distance_watershed, grid: {binary_threshold: {seed: [0.5]}}}",
     "has no such axis"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), FAULTS, ids=[text for text, _ in FAULTS])
def test_a_fault_of_a_space_is_told(write: Write, text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_space(path)
    assert "pydantic" not in str(caught.value)
    assert "\n" not in str(caught.value)
    result = check_file(path)
    assert (result.kind, result.ok, result.error) == ("search space", False, str(caught.value))


# --- Small functions ----------------------------------------------------------------------------


def test_check_tells_candidates_from_spaces(write: Write, tmp_path: Path) -> None:
    assert (check_file("hydra_lv").kind, check_file("hydra_lv").ok) == ("search space", True)
    assert (check_file("baseline").kind, check_file("baseline").ok) == ("candidate", True)
    assert check_file(write("optimization: {max_epochs: 600}")).kind == "candidate"
    assert check_file(write("base: smoke")).kind == "search space"
    broken = check_file(write("a: [1"))
    assert not broken.ok
    assert "no valid YAML" in str(broken.error)
    assert not check_file(tmp_path / "none.yaml").ok


def test_a_space_is_explained() -> None:
    told = "\n".join(explain_file("hydra_lv"))
    assert "75,600 combinations" in told
    assert "baseline" in told
    assert "optimizer steps" in told


def test_the_objective_is_minimised() -> None:
    metrics = {
        "adapted_rand_error": 0.2, "adapted_rand_error_foreground": 0.4, "f1_iou50": 0.9,
        "voi_split": 0.5, "voi_merge": 0.25,
    }  # fmt: skip
    values = {
        name: objective_value(metrics, Objective(metric=name))  # type: ignore[arg-type]
        for name in ("adapted_rand_error", "adapted_rand_error_foreground", "f1_iou50", "voi")
    }
    assert values == pytest.approx({
        "adapted_rand_error": 0.2, "adapted_rand_error_foreground": 0.4, "f1_iou50": 0.1,
        "voi": 0.75,
    })  # fmt: skip


def test_swept_thresholds_are_a_partial_candidate(tmp_path: Path) -> None:
    name = "decode_instance_binary_contour_distance"
    arguments = {"binary_threshold": (0.5, 0.7), "contour_threshold": (0.8, float("inf")),
                 "distance_threshold": (0.5, -0.5), "min_seed_size": 4, "flood": "support"}  # fmt: skip
    text = thresholds_yaml(name, arguments)
    assert parse_yaml(text, "here")["test"]["decoding"][0]["kwargs"]["contour_threshold"] == [
        0.8, None,
    ]  # fmt: skip
    path = tmp_path / "best.yaml"
    path.write_text(text)
    step = load_candidate(path).test.decoding[0]
    assert step.name == name
    assert step.kwargs["binary_threshold"] == [0.5, 0.7]


def test_the_small_space_is_for_minutes_of_a_core_and_every_network_of_it_fits() -> None:
    from hydralv_tune.trial.scoring.prediction import network_of, plan_windows

    space = load_space("hydra_lv_small")
    assert space.budget.timeout_s == 3600
    assert 0.99 in space.decoding.axes["binary_threshold.seed"]
    for name in space.parameters["network"].choices:
        candidate = space.candidate({"network": name})
        assert sum(p.numel() for p in network_of(candidate).parameters()) < 1.2e6
        assert plan_windows((24, 200, 200), candidate).count > 1
        assert candidate.data.patch_size == (16, 64, 64)


@pytest.mark.parametrize(("gpu", "space"), [(True, "hydra_lv"), (False, "hydra_lv_small")])
def test_auto_is_the_space_for_this_machine_and_says_which(
    gpu: bool, space: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    from hydralv_tune.cli import studies

    seen: list[str] = []

    def begun(name: str, *_: Any, **__: Any) -> dict[str, Any]:
        seen.append(name)
        return {"best": None, "study": name}

    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(studies, "_run", begun)
    for name in ("im", "label"):
        write_array(tmp_path / f"{name}.h5", np.ones((4, 8, 8), np.uint8))
    files = ["--image", str(tmp_path / "im.h5"), "--label", str(tmp_path / "label.h5")]
    assert exit_code(["run", "auto", *files]) == 0
    assert seen == [space]
    assert f"so {space} is searched" in capsys.readouterr().err
    assert exit_code(["run", "auto", *files, "--ray-address", "10.0.0.1:6379"]) == 2
    assert "Name the space" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"optimization": {"optimizer": {"lr": -1.0}}},
        {"optimization": {"optimizer": {"lr": 1e-9}}},  # key against key
        {"data": {"patch_size": [32, 128, 100]}},  # block against block, of which one is known
        {"data": {"no_such_key": 1}},
    ],
)
def test_blocks_that_are_known_are_not_checked_again_and_all_others_are(change: Any) -> None:
    base, known = load_candidate("baseline").as_mapping(), KnownBlocks()
    first = whole_candidate(base, "here", known)
    slower = merged(base, {"optimization": {"optimizer": {"lr": 5e-5}}})
    assert whole_candidate(slower, "here", known) == whole_candidate(slower, "here")
    assert whole_candidate(slower, "here", known).model is first.model
    said = []
    for blocks in (None, known, known):
        with pytest.raises(ConfigError) as caught:
            whole_candidate(merged(base, change), "here", blocks)
        said.append(str(caught.value))
    assert said[1:] == said[:1] * 2
