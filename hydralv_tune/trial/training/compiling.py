"""`torch.compile`, tried once in a process and waited for no longer than a limit."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LIMIT_S = 300.0
"""How long compiling may take; a compiler that hangs must not hold a trial for ever."""

_refusals: list[str] = []
"""Why compiling is not tried again in this process: at most one reason."""


def compiled_form(
    network: nn.Module, shape: Sequence[int], *, autocast: bool, limit_s: float = LIMIT_S
) -> tuple[Callable[[Tensor], Any] | None, str | None]:
    """Return the compiled form of a network, or None and a sentence where it is not to be had.

    A copy of the network goes through one forward and backward pass in a thread of its own. What
    it compiles lies in the compiler's cache then, so that the network itself is ready at once.

    Args:
        network: On its device.
        shape: Of a batch of images.
        autocast: Whether the forward pass runs in bf16.
        limit_s: Seconds after which it is trained as it is.
    """
    if not _refusals:
        failed: list[str] = []
        ended = threading.Event()

        def attempt() -> None:
            try:
                _pass(copy.deepcopy(network), shape, autocast)
            except Exception as error:
                failed.append((str(error).splitlines() or [type(error).__name__])[0])
            ended.set()

        threading.Thread(target=attempt, name="compile", daemon=True).start()
        if not ended.wait(limit_s):
            refuse(f"it was not done after {limit_s:g} s")
        elif failed:
            refuse(failed[0])
    if _refusals:
        return None, sentence(_refusals[0])
    compiled: Callable[[Tensor], Any] = torch.compile(network)
    return compiled, None


def refuse(reason: str) -> None:
    """Do not try again in this process."""
    _refusals[:] = [reason[:200]]


def sentence(reason: str) -> str:
    """Return what a trial's notes say of a network that is not compiled."""
    return f"torch.compile does not work here, so it is not used: {reason[:200]}"


def _pass(network: nn.Module, shape: Sequence[int], autocast: bool) -> None:
    """Compile a network by one forward and backward pass."""
    device = next(network.parameters()).device
    compiled = torch.compile(network)
    image = torch.zeros(tuple(shape), device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        outputs = compiled(image)
    heads = [outputs] if isinstance(outputs, Tensor) else outputs
    torch.stack([head.float().mean() for head in heads]).sum().backward()  # type: ignore[no-untyped-call]
