"""What `deploy/` holds can be used: it parses, and its commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"


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
