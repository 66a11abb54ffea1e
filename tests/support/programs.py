"""Programs that no wheel contains."""

from __future__ import annotations

import shutil

_PACKAGES = {"node": "nodejs", "promtool": "prometheus"}


def installed(program: str) -> str:
    """The path of a program. The LookupError for a missing one says how to install it."""
    path = shutil.which(program)
    if path is None:
        package = _PACKAGES.get(program, program)
        raise LookupError(
            f"{program} is not installed. On Debian and Ubuntu: apt-get install {package}"
        )
    return path
