"""The parts of a segmentation as tasks on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from hydralv_tune.config.errors import TrialFailed
from hydralv_tune.config.plugins import Registration, register_again, registrations
from hydralv_tune.launch.cluster import check_before_ray, ray_cluster
from hydralv_tune.trial.whole_volume.segmentation import Jobs


class RayJobs(Jobs):
    """Runs every job as a task; the work folder must be one that all nodes share.

    Args:
        workers: How many tasks at once.
        together: How many of them on one node at most.
        gpus: Whether a task takes a GPU.
    """

    def __init__(self, workers: int, together: int, *, gpus: bool) -> None:
        self.workers, self.together = workers, together
        self._options: dict[str, Any] = {
            "num_cpus": 1, "num_gpus": 1 if gpus else 0, "max_retries": 2,
        }  # fmt: skip

    def run(
        self, function: Callable[[str, int], Any], folder: str, numbers: Sequence[int]
    ) -> Iterator[int]:
        """Yield the number of each job that is done, as they end."""
        task = ray.remote(_one).options(**self._options)
        place, made = os.path.abspath(folder), registrations()
        running = {task.remote(function, place, n, made): n for n in numbers}
        while running:
            done, _ = ray.wait(list(running), num_returns=1)
            number = running.pop(done[0])
            try:
                ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from None
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[0]
                raise TrialFailed(
                    "segmentation", f"a worker ended ({reason[:200]})", retry=True
                ) from error
            yield number


def _one(
    function: Callable[[str, int], Any], folder: str, number: int, made: list[Registration]
) -> None:
    """Run one job with one thread: there are as many jobs at once as cores."""
    import torch

    register_again(made)
    torch.set_num_threads(1)
    function(folder, number)


@contextmanager
def ray_jobs(address: str) -> Iterator[RayJobs]:
    """Join a cluster, and give what spreads jobs over it.

    Raises:
        InputError: There is no cluster to join.
    """
    check_before_ray(address, None, None)
    with ray_cluster(address, []):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        kind = "GPU" if any(node.get("GPU") for node in nodes) else "CPU"
        slots = [int(node.get(kind, 0)) for node in nodes]
        yield RayJobs(max(sum(slots), 1), max(*slots, 1), gpus=kind == "GPU")
