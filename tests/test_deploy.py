"""What `deploy/` and `pyproject.toml` hold can be used: it parses, and what it names exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
    if not text.startswith("hydralv-tune")
]


def run_options() -> set[str]:
    """Return the options of `hydralv-tune run`."""
    result = subprocess.run(
        [sys.executable, "-m", "hydralv_tune", "run", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )
    return set(re.findall(r"--[a-z-]+", result.stdout))


def test_every_option_in_the_deployments_exists() -> None:
    known = run_options()
    job = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())
    script = (DEPLOY / "slurm.sh").read_text()
    commands = [job["spec"]["entrypoint"], script[script.index("hydralv-tune run") :]]
    for command in commands:
        assert command.startswith("hydralv-tune run")
        used = set(re.findall(r"--[a-z-]+", command))
        assert used
        assert used <= known, used - known


def test_the_slurm_script_parses_and_says_how_it_is_used() -> None:
    script = DEPLOY / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    result = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "usage: sbatch" in result.stderr


def test_no_deployment_holds_a_password_or_an_open_port() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert not any(key.endswith("PASSWORD") for key in service["environment"])
    for path in DEPLOY.iterdir():
        assert not re.search(r"://\w+:[^@\s]+@", path.read_text()), path
    job = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("required", REQUIREMENTS, ids=str)
def test_what_is_required_has_an_upper_bound_and_is_what_was_tested(required: Requirement) -> None:
    assert {"<", ">="} <= {bound.operator for bound in required.specifier}
    assert required.specifier.contains(version(required.name))
    pinned = re.search(
        rf"^{re.escape(required.name)}==(.+)$", (ROOT / "constraints.txt").read_text(), re.I | re.M
    )
    assert pinned is not None, f"constraints.txt pins no {required.name}"
    assert required.specifier.contains(pinned[1].partition("+")[0])
