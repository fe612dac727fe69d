"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real volumes, which lies beside the repository, not in it."""
    folder = Path(os.environ.get("HYDRALV_TEST_DATA", REPOSITORY / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real volumes at {folder}; set HYDRALV_TEST_DATA to their folder")
    return folder.resolve()
