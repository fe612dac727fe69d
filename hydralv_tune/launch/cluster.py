"""The Ray cluster of a run: started here or joined, watched, and how much fits into it."""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress

import ray
import torch

from hydralv_tune.config.errors import InputError
from hydralv_tune.data.volumes import Volume
from hydralv_tune.launch.coordinator import RAY_DIED
from hydralv_tune.launch.ray_private import (
    found_address,
    listen_on_loopback_only,
    own_node,
    silence,
)
from hydralv_tune.numerics.cores import usable_cores

RESOURCES_EVERY_S = 3.0
WATCH_EVERY_S = 1.0
UNWIND_S = 20.0
CONNECT_S = 10.0
HTTP2_SETTINGS = b"\x04"
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + HTTP2_SETTINGS + bytes(5)
OBJECT_STORE_BYTES = 200 * 2**20
SHORT_FOLDER = "/tmp"
SOCKET_BYTES = 107 if sys.platform.startswith("linux") else 103
LONGEST_SOCKET = "ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"


class Resources:
    """What a trial takes and how many fit into the cluster now."""

    def __init__(self, gpus_per_trial: float | None, cpus_per_trial: int | None) -> None:
        total = ray.cluster_resources()
        gpus, cpus = total.get("GPU", 0.0), total.get("CPU", 1.0)
        self.gpus = float((1.0 if gpus else 0.0) if gpus_per_trial is None else gpus_per_trial)
        self.cpus = cpus_per_trial or self._fair_share()
        self._next_look, self._slots = 0.0, 0
        if self.slots() < 1:
            raise InputError(
                f"run: a trial takes {self.cpus} CPU cores and {self.gpus:g} GPUs, but the Ray "
                f"cluster has {cpus:g} and {gpus:g}. Lower --cpus-per-trial or --gpus-per-trial."
            )

    def _fair_share(self) -> int:
        """Return the cores of a trial where all GPUs are busy; 1 where there is no GPU."""
        shares = [
            int(node["Resources"].get("CPU", 0.0) // int(node["Resources"]["GPU"] / self.gpus))
            for node in ray.nodes()
            if self.gpus and node["Alive"] and node["Resources"].get("GPU", 0.0) >= self.gpus
        ]
        return max(1, min(shares, default=1))

    def slots(self) -> int:
        """Return how many trials fit into the nodes that are alive."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + RESOURCES_EVERY_S
            self._slots = sum(self._fit(node["Resources"]) for node in ray.nodes() if node["Alive"])
        return self._slots

    def _fit(self, resources: Mapping[str, float]) -> int:
        """Return how many trials fit into one node."""
        by_cpu = resources.get("CPU", 0.0) / self.cpus
        by_gpu = resources.get("GPU", 0.0) / self.gpus if self.gpus else math.inf
        return int(min(by_cpu, by_gpu) + 1e-9)


def check_before_ray(
    address: str | None, gpus_per_trial: float | None, cpus_per_trial: int | None
) -> None:
    """Refuse what cannot work before Ray starts and the study is made.

    Args:
        address: Of the cluster to join; None: one starts on this machine.
        gpus_per_trial: As asked for.
        cpus_per_trial: As asked for.

    Raises:
        InputError: Nobody answers at the address, this machine holds no single trial, or no
            folder can hold the sockets of a Ray that is started here.
    """
    if address is None:
        gpus, cpus = torch.cuda.device_count(), usable_cores()
        if (gpus_per_trial or 0.0) > gpus or (cpus_per_trial or 1) > cpus:
            raise InputError(
                f"run: a trial takes {cpus_per_trial or 1} CPU cores and {gpus_per_trial or 0:g} "
                f"GPUs, but this machine has {cpus} and {gpus}. Lower --cpus-per-trial or "
                "--gpus-per-trial."
            )
        ray_folder()
        return
    try:
        is_client = address.startswith("ray://")
        # What `auto` means is found here, since `ray.init` would wait for it for ever.
        found = address if is_client else found_address(address)
        if found is not None:  # `local` is Ray's own word
            _require_ray(found.removeprefix("ray://"))
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers at --ray-address {address} ({error}). Start one with "
            "`ray start --head`, or leave the option out to start one here."
        ) from error


def ray_folder() -> str:
    """Return the folder of a Ray that is started here; its sockets' paths must be short.

    Ray takes `RAY_TMPDIR`, `TMPDIR` or `/tmp`. Clusters set a `TMPDIR` for each job that can be
    too long for a socket, or that is gone; `/tmp` is used then.

    Raises:
        InputError: `RAY_TMPDIR` itself is too long, or none can be written to.
    """
    chosen = os.environ.get("RAY_TMPDIR")
    for folder in [chosen] if chosen else [os.environ.get("TMPDIR") or SHORT_FOLDER, SHORT_FOLDER]:
        is_short = len(os.fsencode(os.path.join(folder, LONGEST_SOCKET))) <= SOCKET_BYTES
        if is_short and os.path.isabs(folder) and os.access(folder, os.W_OK | os.X_OK):
            return os.path.join(folder, "ray")
    longest = SOCKET_BYTES - len(LONGEST_SOCKET) - 1
    raise InputError(
        f"run: Ray cannot keep its sockets in {chosen or SHORT_FOLDER}. Set RAY_TMPDIR to a folder "
        f"that you can write to, whose absolute path has at most {longest} bytes."
    )


def _require_ray(address: str) -> None:
    """Raise `OSError` or `ValueError` unless a gRPC server, as Ray's is, answers at HOST:PORT."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        connection.sendall(HTTP2_GREETING)
        if connection.recv(9)[3:4] != HTTP2_SETTINGS:
            raise ValueError(f"what listens at {address} is not Ray; its port is 6379 by default")


class Cluster:
    """Watches the daemons of a Ray that was started here.

    Without them this process hangs in Ray's own code, or is ended by it after a minute. So once
    one has died, the study gets its last words and the process ends, whatever it is doing.
    """

    def __init__(self, *, is_ours: bool) -> None:
        self.last_words: Callable[[], None] | None = None
        self.is_interrupted: Callable[[], bool] = lambda: False
        self._node = own_node() if is_ours else None
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="ray-watch", daemon=True).start()

    def is_alive(self) -> bool:
        """Return whether Ray's daemons live; of a cluster that was joined, Ray itself says so."""
        return self._node is None or not self._node.dead_processes()

    def end(self) -> None:
        """Stop watching: they are about to be stopped."""
        self._over.set()

    def _watch(self) -> None:
        """End this process if Ray has died and nothing else has ended it in time."""
        while not self._over.wait(WATCH_EVERY_S):
            if self.is_alive():
                continue
            if self._over.wait(UNWIND_S):
                return
            with suppress(Exception):  # whatever happens now, the process ends
                if self.last_words is not None:
                    self.last_words()
            if self.is_interrupted():
                os._exit(130)
            sys.stderr.write(f"error: {RAY_DIED}\n")
            sys.stderr.flush()
            os._exit(1)


@contextmanager
def ray_cluster(address: str | None, volumes: Sequence[Volume]) -> Iterator[Cluster]:
    """Join a Ray cluster, or start one with room for the volumes that ends with this block.

    Raises:
        InputError: There is no cluster to join.
    """
    level = logging.ERROR
    silence()
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=level)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise InputError(_why_not_joined(address, str(error).strip() or repr(error))) from error
    else:
        # Whoever can reach Ray's ports can run code: loopback only, and a token besides.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        listen_on_loopback_only()
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(
            address="local",
            num_cpus=usable_cores(),  # Ray counts those that the process may not use too
            include_dashboard=False,
            log_to_driver=False,
            logging_level=level,
            _temp_dir=ray_folder(),
            object_store_memory=OBJECT_STORE_BYTES + 2 * sum(map(_bytes, volumes)),
        )
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    cluster = Cluster(is_ours=address is None)
    try:
        # Ray prints what its daemons say on stdout, which belongs to the caller's document.
        with redirect_stdout(sys.stderr):
            yield cluster
    finally:
        if cluster.is_alive():
            cluster.end()
        ray.shutdown()
        cluster.end()


def _why_not_joined(address: str, reason: str) -> str:
    """Return why a cluster could not be joined, and what to do."""
    versions = re.findall(r"(Ray|Python): *([\w.+-]+)", reason)
    if "mismatch" in reason.lower() and len(versions) >= 4:
        (_, ray_there), (_, python_there), (_, ray_here), (_, python_here) = versions[:4]
        return (
            f"the cluster at --ray-address {address} runs Ray {ray_there} on Python "
            f"{python_there}, here are Ray {ray_here} and Python {python_here}; both must be "
            f"equal. Install ray=={ray_here} there or ray=={ray_there} here, under one Python."
        )
    first = reason if "mismatch" in reason.lower() else reason.splitlines()[0]
    return (
        f"no Ray cluster could be joined at --ray-address {address} "
        f"({' '.join(first.split())}). Start one with `ray start --head`, or leave the option out "
        "to start one here."
    )


def _bytes(volume: Volume) -> int:
    """Return the bytes of a volume's arrays."""
    arrays = (volume.image, volume.label, volume.mask, volume.scored_mask)
    return sum(array.nbytes for array in arrays if array is not None)
