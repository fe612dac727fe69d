"""Ray nodes on this machine: `python ray_cluster.py '[{"num_cpus": 1}, {"num_cpus": 1}]'`.

It says the address; a line on stdin kills the last node, and the end of stdin ends all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
"""What a driver needs too."""


@contextmanager
def ray_cluster(*nodes: dict[str, Any]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Start nodes; give the address, and a function that kills the last node.

    Args:
        nodes: What each has: `num_cpus`, `num_gpus`. Ray counts devices, none need exist.
    """
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(nodes)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None

    def kill_last() -> None:
        process.stdin.write("kill\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == "killed"

    try:
        address = process.stdout.readline().strip()
        assert ":" in address, address
        yield address, kill_last
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def main(nodes: list[dict[str, Any]]) -> None:
    """Run the nodes until stdin ends."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=nodes[0])
    last = None
    for node in nodes[1:]:
        last = cluster.add_node(**node)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    try:
        for _ in sys.stdin:
            cluster.remove_node(last, allow_graceful=False)
            print("killed", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
