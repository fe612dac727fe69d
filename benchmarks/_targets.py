"""Whether a figure meets its target, said in the same words by every benchmark."""

from __future__ import annotations


def verdict(value: float, *, at_most: float | None = None, at_least: float | None = None) -> str:
    """Return what a line ends in: the target and whether it is met; nothing where there is none.

    Args:
        value: The figure that was measured.
        at_most: It must not be above this.
        at_least: It must not be below this.
    """
    bounds = (("at most", at_most), ("at least", at_least))
    said = [f"{words} {bound:g}" for words, bound in bounds if bound is not None]
    if not said:
        return ""
    met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    return f"   target {' and '.join(said)}: {'met' if met else 'MISSED'}"
