"""Commands run as a user runs them, in a process of their own; what several tests share."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path


def environment() -> dict[str, str]:
    """Return an environment of one thread and no colours."""
    return {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def serve_and_stop(words: list[str], folder: Path) -> None:
    """Start the dashboard on a free port, open it, and end it as a user does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        words = [*words, "--port", str(free.getsockname()[1])]
    process = subprocess.Popen(
        [sys.executable, "-m", "hydralv_tune", *words],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=folder,
        env=environment(),
        # Tests that a shell runs in the background inherit that Ctrl-C is ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    try:
        said = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        with urllib.request.urlopen(found.group(0), timeout=30) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) in (0, 130)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()
