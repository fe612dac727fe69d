"""What a training measures of itself: where the time goes, and what the losses are."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hydralv_tune.config.errors import TrialFailed


class Clock:
    """Sums the time that goes into each part of a step; on a GPU without waiting for it.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._last: Any = None
        self._pending: list[tuple[str, Any, Any]] = []

    def start(self) -> None:
        """Begin to measure."""
        self._last = self._now()

    def lap(self, name: str) -> None:
        """Count the time since the last call for `name`."""
        now = self._now()
        if self.device.type == "cuda":
            self._pending.append((name, self._last, now))
        else:
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def flush(self) -> None:
        """Read the events of the GPU; the caller waits for it anyway."""
        if not self._pending:
            return
        self._pending[-1][2].synchronize()
        for name, begin, end in self._pending:
            self.seconds[name] = self.seconds.get(name, 0.0) + begin.elapsed_time(end) / 1e3
        self._pending.clear()

    def _now(self) -> Any:
        """Return a time, or on a GPU an event in its queue."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class LossLog:
    """Gathers losses on the device, and reads them only when asked.

    Args:
        names: Of the values of each micro-batch; the first is the total.
        device: Where the losses are.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self.sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        self.count = 0
        self._read: tuple[Tensor | float, int] = 0.0, 0
        self.last = torch.zeros_like(self.sums)
        self.epoch_sums = torch.zeros_like(self.sums)
        self.epoch_count = 0
        self.epochs: list[Tensor] = []
        self.bad_step = torch.full((), -1.0, dtype=torch.float64, device=device)
        self.bad_values = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, values: Tensor, step: int) -> None:
        """Add the losses (K,) of one micro-batch of an optimizer step."""
        values = values.double()
        bad = ~torch.isfinite(values).all() & (self.bad_step < 0)
        self.bad_step = torch.where(bad, float(step), self.bad_step)
        self.bad_values = torch.where(bad, values, self.bad_values)
        self.sums += values
        self.epoch_sums += values
        self.count += 1
        self.epoch_count += 1

    def close_epoch(self) -> None:
        """Keep the means of the epoch that ends."""
        self.epochs.append(self.epoch_sums / max(self.epoch_count, 1))
        self.epoch_sums = torch.zeros_like(self.epoch_sums)
        self.epoch_count = 0

    def check(self) -> list[dict[str, float]]:
        """Return the mean of each loss in each epoch that ended since the last call.

        Raises:
            TrialFailed: A loss was not finite; the step and the parts are named.
        """
        # One copy for all, since each makes the host wait.
        bad_step = self.bad_step.expand(len(self.names))
        (step, *_), bad, *ended = (
            torch.stack([bad_step, self.bad_values, *self.epochs]).cpu().tolist()
        )
        if step >= 0:
            values = dict(zip(self.names, bad, strict=True))
            parts = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            raise TrialFailed(
                "training", f"the loss is not finite at step {int(step)}: {parts}", retry=False
            )
        self.epochs.clear()
        return [dict(zip(self.names, means, strict=True)) for means in ended]

    def means(self) -> dict[str, float]:
        """Return the mean of each loss since the last call.

        Where nothing was added since, as in a fold that stopped early, those of the last call:
        they still are the losses of these weights.
        """
        if self.count:
            self.last = self.sums / self.count
            self.sums = torch.zeros_like(self.sums)
            self.count = 0
            self._read = 0.0, 0
        return dict(zip(self.names, self.last.cpu().tolist(), strict=True))

    def total_so_far(self) -> float | None:
        """Return the mean total since the last call of `means`; None before the first step.

        The host waits for the device.
        """
        return float(self.sums[0] / self.count) if self.count else None

    def recent(self) -> dict[str, float]:
        """Return the mean of each loss since the last call, or since `means`; empty if none came.

        The host waits for the device.
        """
        sums, count = self._read
        if self.count == count:
            return {}
        recent = (self.sums - sums) / (self.count - count)
        self._read = self.sums.clone(), self.count
        return dict(zip(self.names, recent.cpu().tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "sums": self.sums, "count": self.count, "last": self.last,
            "epoch_sums": self.epoch_sums, "epoch_count": self.epoch_count,
            "epochs": list(self.epochs),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        device = self.sums.device
        self.sums, self.last = state["sums"].to(device), state["last"].to(device)
        self.epoch_sums = state["epoch_sums"].to(device)
        self.epochs = [mean.to(device) for mean in state["epochs"]]
        self.count, self.epoch_count = int(state["count"]), int(state["epoch_count"])
