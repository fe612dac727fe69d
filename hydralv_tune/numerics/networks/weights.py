"""What a network holds: its parameters, its trunk, and how a file of weights fits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hydralv_tune.numerics.networks.registry import architecture


@dataclass(frozen=True)
class WeightsReport:
    """What of a state dict fits a network.

    Args:
        matched: Names of the network's tensors that the state dict gives.
        missing: Names of the network's tensors that it does not give.
        unexpected: Names in it that the network does not have.
        mismatched: Names whose shapes differ, with both shapes.
        share: Matched tensors over the network's tensors, 0 to 1.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        """Return the share, and the first names of what does not fit."""
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        parts = [f"{len(self.matched)} of {total} tensors match ({self.share:.1%})"]
        for title in ("missing", "mismatched", "unexpected"):
            names = getattr(self, title)
            if names:
                more = f" and {len(names) - 4} more" if len(names) > 4 else ""
                parts.append(f"{len(names)} {title}: {', '.join(names[:4])}{more}")
        return "; ".join(parts)


def parameter_count(network: nn.Module) -> int:
    """Return the number of trained scalars."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def trunk_weights(name: str, network: nn.Module) -> list[Tensor]:
    """Return the weights of the convolutions before the heads, first to last.

    Args:
        name: A name of `ARCHITECTURES`.
        network: As `build_network` gives it for that name.

    Raises:
        ValueError: The name is unknown.
    """
    heads = architecture(name).heads
    return [
        module.weight
        for key, module in network.named_modules()
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d)
        and not any(f"{key}.".startswith(f"{head}.") for head in heads)
    ]


def match_weights(
    network: nn.Module, state_dict: Mapping[str, Any], *, prefix: str = "", strict: bool = True
) -> WeightsReport:
    """Load what fits into the network in place, and return what did and what did not.

    Args:
        network: Left as it is where an error is raised.
        state_dict: Names to tensors.
        prefix: Start of the names, cut off; names without it are unexpected.
        strict: Whether every tensor of the network must be given.

    Raises:
        ValueError: Nothing matches; or, when strict, not everything does.
    """
    own = network.state_dict()
    given = {
        key[len(prefix) :]: value
        for key, value in state_dict.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }
    fits = {key: v for key, v in given.items() if key in own and v.shape == own[key].shape}
    report = WeightsReport(
        matched=tuple(key for key in own if key in fits),
        missing=tuple(key for key in own if key not in given),
        unexpected=tuple(
            key for key in state_dict
            if not key.startswith(prefix) or key[len(prefix) :] not in own
        ),
        mismatched=tuple(
            f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}"
            for key in own if key in given and key not in fits
        ),
        share=len(fits) / len(own) if own else 1.0,
    )  # fmt: skip
    if own and not fits:
        raise ValueError(f"no weight fits the network: {report}.{_prefix_hint(own, state_dict)}")
    if strict and report.share < 1:
        raise ValueError(
            f"the weights fit the network only in part: {report}. Give the weights of this "
            "architecture and width, or allow a partial match (external_weights_strict: false)."
        )
    before = {key: value.clone() for key, value in own.items()}
    try:
        network.load_state_dict({**own, **fits})
    except RuntimeError as error:
        network.load_state_dict(before)
        raise ValueError(f"the weights do not fit the network: {error}") from error
    return report


def _prefix_hint(own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> str:
    """Return a sentence that names the prefix under which the weights would fit, if any."""
    for name in own:
        for key in state_dict:
            if key.endswith(name):
                return f" Try the prefix '{key[: -len(name)]}'."
    return " Is it another architecture?"
