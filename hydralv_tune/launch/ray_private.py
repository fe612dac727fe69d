"""Everything that the package uses of Ray beyond its public interface.

`tests/test_launch.py` checks each name, and says which one a new release of Ray has moved.
"""

from __future__ import annotations

from typing import Any

import ray
from ray._private import ray_constants, services, utils, worker
from ray._private.node import Node
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.tune.execution.tune_controller import TuneController

PRIVATE_NAMES: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (services, ("canonicalize_bootstrap_address",)),
    (worker, ("_global_node", "print_to_stdstream")),
    (utils, ("get_entrypoint_name",)),
    (ray_constants, ("ENABLE_RAY_CLUSTER",)),
    (Node, ("dead_processes",)),
    (TuneController, ("_trial_to_actor", "_actor_manager")),
    (RayActorManager, ("_live_actors_to_ray_actors_resources",)),
)
"""Private names by owner: of a module, of a class, or set by the `__init__` of a class."""


def silence() -> None:
    """Keep the command line of this process from the cluster, and its daemons' words from here."""
    # Ray hands its cluster the command line of this process, where a storage URL may stand.
    utils.get_entrypoint_name = lambda: "hydralv-tune"
    # What its daemons say of dead workers is told as an event, in our words.
    worker.print_to_stdstream = lambda *_, **__: None


def listen_on_loopback_only() -> None:
    """Let a Ray that is started here listen on 127.0.0.1, and not on every interface.

    Ray has this switch for Windows and macOS.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False


def own_node() -> Any:
    """Return the daemons that `ray.init` has started here; its `dead_processes()` lists dead ones.

    None where it has joined a cluster.
    """
    return worker._global_node


def found_address(address: str) -> str | None:
    """Return HOST:PORT of a cluster; what `auto` means is looked up, `local` is None.

    Raises:
        ValueError: The address is malformed.
        ConnectionError: `auto` finds no cluster.
    """
    found: str | None = services.canonicalize_bootstrap_address(address)
    return found


def actor_of(tune_controller: Any, trial: Any) -> ray.actor.ActorHandle | None:
    """Return the actor of a Ray trial once it has its place, or None.

    Ray calls a trial RUNNING only when its process has imported what it needs. One that hangs
    before is PENDING, as is one that waits in a busy cluster; only the manager tells them apart.
    """
    tracked = tune_controller._trial_to_actor.get(trial)
    placed = tune_controller._actor_manager._live_actors_to_ray_actors_resources
    return placed[tracked][0] if tracked in placed else None
