"""Writes the browser client's classic script: ``python -m tests.support.classic_script``.

Both scripts stand by themselves. A module that imported the classic one would set globals, and
would get it under the name that static files storages do not put a hash into.
"""

from __future__ import annotations

import re
from pathlib import Path

import pg_eventstream

STATIC = Path(pg_eventstream.__file__).parent / "static"
MODULE = STATIC / "pg_eventstream" / "reconnecting-eventsource.mjs"
CLASSIC = MODULE.with_suffix(".js")


def classic(module: str) -> str:
    """The same code, inside a function that sets what the module exports on the window."""
    exported = ", ".join(re.findall(r"^export class (\w+)", module, re.MULTILINE))
    code = re.sub(r"^export default .*\n", "", module, flags=re.MULTILINE)
    code = re.sub(r"^export ", "", code, flags=re.MULTILINE).strip()
    return "\n".join(
        [
            f"// Written by tests/classic_script.py from {MODULE.name}: change that.",
            '(() => {\n"use strict";\n',
            code,
            f"\nObject.assign(globalThis, {{ {exported} }});",
            "})();\n",
        ]
    )


if __name__ == "__main__":
    CLASSIC.write_text(classic(MODULE.read_text(encoding="utf-8")), encoding="utf-8")
