"""The Python of each how-to runs as it stands, in a script; the reference of names is current."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands_in_a_process import environment

from hydralv_tune.api.reference import reference

REPOSITORY = Path(__file__).parents[1]
RUN_ELSEWHERE = {"docs/howto/use-the-model-elsewhere.md": "tests/test_export.py"}
"""Pages that start from an export, and the test that runs their Python after one."""
PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in (REPOSITORY / "docs/howto").glob("*.md")
    if "```python\n" in path.read_text()
)


def test_the_pages_are_there() -> None:
    assert "docs/howto/python.md" in PAGES
    for page, test in RUN_ELSEWHERE.items():
        assert page in PAGES
        assert Path(page).name in (REPOSITORY / test).read_text()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if page not in RUN_ELSEWHERE])
def test_the_python_of_a_page_runs_as_it_stands(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / page).read_text(), re.S | re.M)
    (tmp_path / "page.py").write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**environment(), "PYTHONPATH": str(REPOSITORY)}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_reference_of_the_names_is_current() -> None:
    written = (REPOSITORY / "docs/reference/api.md").read_text()
    assert written == reference(), "python -m hydralv_tune.api.reference > docs/reference/api.md"
