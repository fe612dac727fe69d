"""How much memory a training step takes, counted without taking any, and whether it ran out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BYTES_PER_PARAMETER = 16
"""Weight, gradient and the two moments of AdamW, float32 each."""


def training_bytes(
    network: nn.Module,
    loss: Callable[[Any, Tensor, Tensor], Any],
    *,
    batch: int,
    patch_size: Sequence[int],
    averaged: bool = False,
    mixed: bool = False,
) -> int:
    """Return the bytes that a micro-batch takes from forward to optimizer, at least.

    Counted are parameters, gradients, the optimizer's moments, and what autograd keeps for the
    backward pass, each storage once. Workspaces of convolutions and the library itself (some
    0.5 GB with CUDA) come on top.

    Args:
        network: On the device `meta`, in training mode; it has (1, Z, Y, X) in, 3 channels out.
        loss: On `meta`; function of (outputs, targets, mask) that returns a result with `total`.
        batch: Patches of a micro-batch.
        patch_size: Voxels (z, y, x).
        averaged: Whether an average of the weights is kept too.
        mixed: Whether the forward pass runs in bf16.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # or another storage takes its place
        return tensor

    alive: list[Tensor] = []
    shape = tuple(patch_size)
    image = torch.zeros(batch, 1, *shape, device="meta")
    targets = torch.zeros(batch, 3, *shape, device="meta")
    mask = torch.ones(batch, 1, *shape, dtype=torch.bool, device="meta")
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            outputs = network(image)
        heads = outputs if isinstance(outputs, list) else [outputs]
        loss([head.float() for head in heads], targets, mask)
    activations = sum(size for storage, size in kept.items() if storage not in own)
    parameters = sum(p.numel() for p in network.parameters())
    return activations + parameters * (BYTES_PER_PARAMETER + 4 * averaged)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    # PyTorch's allocators, the driver's own, and what cuBLAS and cuDNN say of their workspace.
    signs = ("out of memory", "can't allocate memory", "_status_alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
