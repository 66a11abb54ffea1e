"""Ages, as people read them."""

from __future__ import annotations


def age(seconds: float) -> str:
    """A number of seconds in the unit that fits: ``3 min``."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 or not seconds else f"{seconds:.1f} s"
