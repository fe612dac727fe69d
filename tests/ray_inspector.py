"""Looks into a running Ray from a process of its own: jobs, and what lies in the object store.

`python ray_inspector.py GCS_ADDRESS` prints one JSON document, or fails as Ray fails. Ray reads its
token as it is imported, so whoever asks gives it in the environment.
"""

from __future__ import annotations

import json
import sys


def main(address: str) -> None:
    """Print what the cluster at an address knows."""
    import ray  # noqa: F401 - sets up what the next ones need
    from ray._private.internal_api import node_stats
    from ray._raylet import GcsClient

    client = GcsClient(address=address)
    jobs = [str(job) for job in client.get_all_job_info().values()]
    (node,) = client.get_all_node_info().values()
    stats = node_stats(
        node.node_manager_address, node.node_manager_port, include_memory_info=False
    ).store_stats
    made = {
        "bytes_made": stats.cumulative_created_bytes,
        "bytes_now": stats.object_store_bytes_used,
    }
    print(json.dumps({"jobs": jobs, **made}))


if __name__ == "__main__":
    main(sys.argv[1])
