"""Every command's `--help` has an example, and the examples work, one after the other.

What is changed stands in `SMALLER`: how large, how long, and nothing else.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from inspect import Parameter, signature
from pathlib import Path
from typing import get_type_hints

import pytest
from commands_in_a_process import environment, serve_and_stop

from hydralv_tune.cli.main import COMMANDS, command_function, exit_code

ALL = {
    name: command_function(address)
    for panel in COMMANDS.values()
    for name, address in panel.items()
}
ORDER = (
    "doctor", "phantom", "inspect", "check", "list", "import", "train", "predict", "sweep",
    "decode", "score", "run", "status", "enqueue", "recover", "ensemble", "export",
    "report",
    "dashboard", "demo", "segment",
)  # fmt: skip
"""Each after those whose files its example reads."""

SMALLER_TRAINING = (
    "optimization.max_epochs=2", "data.iter_num_per_epoch=4", "monitor.evaluation.count=1",
    "data.patch_size=[8,32,32]", "inference.sliding_window.window_size=[8,64,64]",
    "system.training.batch_size=2", "system.cpu_threads=1",
)  # fmt: skip
SMALLER = {"--trials": "2"}
PEER = "model: {architecture: rsunet, filters: [8, 16]}\ndata: {patch_size: [8, 32, 32]}\n"
"""A configuration of PyTorch Connectomics, which the example of `import` reads."""


def smaller(words: list[str]) -> list[str]:
    """Return the same command with a budget of seconds."""
    shorter = [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if words[0] == "demo":  # of `run` two are compared by what comes after
        shorter[shorter.index("--trials") + 1] = "1"
    if words[0] in ("run", "train", "demo"):
        shorter += [part for setting in SMALLER_TRAINING for part in ("--set", setting)]
    return shorter


def example(name: str) -> list[str]:
    """Return the words of a command's example, without the name of the program."""
    text = " ".join((ALL[name].__doc__ or "").split())
    found = re.findall(r"Example: `([^`]*)`", text)
    assert len(found) == 1, f"{name}: one example is due in its docstring"
    program, *words = shlex.split(found[0])
    assert program == "hydralv-tune"
    assert words[0] == name
    return words


def test_every_command_is_in_order() -> None:
    assert sorted(ORDER) == sorted(ALL)


@pytest.mark.parametrize("name", sorted(ALL))
def test_help_shows_what_the_docstring_promises(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code([name, "--help"]) == 0
    shown = "".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "Example:hydralv-tune" + "".join(example(name)) in shown


def test_the_default_of_every_option_is_what_its_parser_takes() -> None:
    taken = []
    for name, function in ALL.items():
        hints = get_type_hints(function, include_extras=True)
        for key, parameter in signature(function).parameters.items():
            for option in getattr(hints[key], "__metadata__", ()):
                if option.parser is not None and parameter.default not in (None, Parameter.empty):
                    assert option.parser(parameter.default) == parameter.default
                    taken.append((name, key))
    assert ("demo", "out") in taken


def test_help_needs_none_of_the_slow_libraries() -> None:
    program = (
        "import sys; from hydralv_tune.cli.main import exit_code; "
        "code = exit_code(['run', '--help']); "
        "slow = {'torch', 'ray', 'optuna', 'monai', 'numba', 'pandas'} & set(sys.modules); "
        "sys.exit(f'imported {slow}' if slow else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        env=environment(), timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(900)
def test_examples_work_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hydra-lv-finetune.yaml").write_text(PEER)
    for name in ORDER:
        words = smaller(example(name))
        if name == "recover":  # those after it show the study that it has rebuilt
            for path in (tmp_path / words[1]).glob("study.db*"):
                path.unlink()
        if name == "dashboard":
            serve_and_stop(words, tmp_path)
        else:
            code = exit_code(words)
            told = capfd.readouterr()
            assert code == 0, f"hydralv-tune {shlex.join(words)}\n{told.err[-3000:]}"
