"""A finding: something that is wrong, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["broken", "degraded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is wrong. Each code is explained in the documentation ("Diagnoses")."""

    code: str
    #: "broken" if events do not arrive or soon will not, else "degraded".
    level: Level
    #: What is wrong.
    message: str
    #: What to do.
    remedy: str
