"""Every command in a `sh` block of README and tutorial is run as it is written, on a small phantom.

What is changed stands in `SMALLER`: how large, how long, and nothing else.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands_in_a_process import environment, serve_and_stop

from hydralv_tune.cli.main import command_line, exit_code
from hydralv_tune.data.volumes import write_array
from hydralv_tune.numerics.phantom.volume import make_phantom

REPOSITORY = Path(__file__).parents[1]
PAGES = ("README.md", pytest.param("docs/tutorial.md", marks=pytest.mark.slow))
NOT_RUN = ("make", "sbatch", "docker", "export", "git", "pip", "cd", "source", "open", "ray")
"""Words that start a line of another tool; `make demo` and `make test` are run by themselves."""

SMALLER_TRAINING = (
    "optimization.max_epochs=2", "data.iter_num_per_epoch=8", "monitor.evaluation.count=1",
    "data.patch_size=[8,32,32]", "inference.sliding_window.window_size=[8,64,64]",
    "system.training.batch_size=2", "system.cpu_threads=1",
)  # fmt: skip
SMALLER = {
    "--shape": ["16", "96", "96"],
    "--instances": ["6"],
    "--trials": ["1"],
    "--gpus-per-trial": ["0"],
}


def commands(page: str) -> list[list[str]]:
    """Return the words of each `hydralv-tune` command in the `sh` blocks of a page."""
    text = (REPOSITORY / page).read_text()
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] in NOT_RUN:
                continue
            assert words[0].endswith("hydralv-tune"), f"{page}: who runs '{line}'?"
            if words[1] != "demo":
                found.append(words[1:])
    return found


def smaller(words: list[str]) -> list[str]:
    """Return the same command for a volume and a budget of seconds."""
    result: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        result.append(word)
        if word in SMALLER:
            while rest and not rest[0].startswith("-"):
                rest.pop(0)
            result += SMALLER[word]
    if words[0] == "run":
        result[1] = "smoke"
    if words[0] in ("run", "train"):
        result += [part for setting in SMALLER_TRAINING for part in ("--set", setting)]
    return [word for word in result if word != "--watch"]


def run(words: list[str], folder: Path) -> None:
    """Run one command; it must end well.

    A study runs in a process of its own, as Ray wants it; the others here, where torch is
    imported already.
    """
    if words[0] != "run":
        assert exit_code(words) == 0, f"hydralv-tune {shlex.join(words)}"
        return
    result = subprocess.run(
        [sys.executable, "-m", "hydralv_tune", *words],
        capture_output=True, text=True, cwd=folder, timeout=560, env=environment(), check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"hydralv-tune {shlex.join(words)}\n{result.stderr[-3000:]}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_work_as_written(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make_phantom(shape=(16, 96, 96), instances=6, seed=3)
    for name, array in (("im", made.image), ("label", made.label), ("mask", made.mask)):
        write_array(tmp_path / f"{name}.h5", array, voxel_size_nm=made.voxel_size_nm)
    ran = commands(page)
    assert len(ran) > 5
    for words in ran:
        step = serve_and_stop if words[0] == "dashboard" else run
        started = time.monotonic()
        step(smaller(words), tmp_path)
        print(f"{page}: {words[0]} in {time.monotonic() - started:.1f} s")


def test_pages_name_only_files_that_are_there() -> None:
    for path in [*(REPOSITORY / "docs").rglob("*.md"), *REPOSITORY.glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.relative_to(REPOSITORY)} names {link}"


def test_how_to_pages_name_only_commands_and_options_that_exist() -> None:
    import typer

    group = typer.main.get_command(command_line([]))
    known = {
        name: {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    for path in (REPOSITORY / "docs").rglob("*.md"):
        for block in re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split()
                if not words or words[0] != "hydralv-tune":
                    continue
                assert words[1] in known, f"{path.name}: {line}"
                options = {w.partition("=")[0] for w in words[2:] if w.startswith("--")}
                assert options <= known[words[1]] | {"--help"}, f"{path.name}: {line}"
