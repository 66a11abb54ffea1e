"""Hostile input for Hypothesis, and a strict parser of event streams."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded_with
from hypothesis import strategies as st

from tests.support.environment import THOROUGH

SEED = os.environ.get("PG_EVENTSTREAM_TEST_SEED", str(time.time_ns()))

_FRAGMENTS = [
    *("", " ", "\t", "\r", "\n", "\r\n", "\0", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u2029"),
    *("\ufeff", "\ufffd", "\U0001f389", "é", "İ", "K", "ß", "\u202e", "a\u0300"),
    *("%", "%%", "%I", "%s", "%()s", "%(events-c)s", "%0d%0a", "%00", "%2500", "%ED%A0%80", "%FF"),
    *(
        ",",
        ":",
        ";",
        "=",
        "<",
        ">",
        '"',
        "'",
        "\\",
        "/",
        "//",
        "..",
        "?",
        "#",
        "&",
        "+",
        "@",
        "{0}",
    ),
    *(
        "\r\nX-Injected: 1\r\n\r\n",
        "\n\nevent: forged\ndata: 1\n\n",
        ": comment",
        "retry: 1",
        "id:",
    ),
    *("'; DROP TABLE pg_eventstream_event; --", "' OR 1=1 --", "$1", "%s%s%s", "\\x00", "E'\\n'"),
    *(
        "c",
        "d",
        "c:0",
        "d:1",
        "c:-1",
        "c:" + "9" * 19,
        "c:" + "9" * 18,
        "error",
        "earliest",
        "staff",
    ),
    *("last-id", "events-c", "events-c; last-id=0", "user-anonymous", "pg_eventstream:permission"),
    *("x" * 256, "a:5," * 60, "<script>alert(1)</script>", "{{7*7}}", "None", "null", "-0", "NaN"),
]

#: Input of an attacker. Valid Unicode; not always storable.
texts = st.one_of(
    st.lists(st.sampled_from(_FRAGMENTS), max_size=4).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
#: Text that PostgreSQL can store.
storable = texts.map(lambda text: text.replace("\0", ""))
#: The same as the value of a header: bytes, as WSGI and ASGI pass them to Django.
header_values = st.one_of(
    texts.map(lambda text: text.encode().decode("latin-1")),
    st.text(st.characters(max_codepoint=255), max_size=12),
)


def fuzzed(examples: int, thorough: int) -> Callable[[Any], Any]:
    """The number of examples in `make test` and in `make test-faults`, from `SEED`."""
    profile = settings(
        max_examples=thorough if THOROUGH else examples,
        deadline=None,
        database=None,
        print_blob=True,
        # One database serves all examples of a test.
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    return lambda test: profile(seeded_with(SEED)(test))


class Parsed(NamedTuple):
    type: str
    data: str
    id: str | None


_FIELDS = re.compile(r"(event|id|data): ?(.*)", re.DOTALL)


def parse_strictly(stream: str) -> list[Parsed]:
    """The events of a complete stream that contains only what the server writes.

    Lines end as in the standard, and not only where the server ends them: anything that a browser
    would take for another field or another event is one here, too.
    """
    assert "\0" not in stream
    assert "\r" not in stream
    events = []
    assert stream == "" or stream.endswith("\n\n"), stream[-50:]
    for block in stream.split("\n\n")[:-1]:
        if block.startswith(":"):
            assert block.strip(": ") == ""  # padding
            continue
        fields: dict[str, list[str]] = {}
        for line in block.split("\n"):
            field = _FIELDS.fullmatch(line)
            assert field, f"a line that is no field of ours: {line!r}"
            fields.setdefault(field[1], []).append(field[2])
        assert fields.keys() <= {"event", "id", "data"}
        assert len(fields["event"]) == 1
        assert len(fields.get("id", [])) < 2
        events.append(
            Parsed(fields["event"][0], "\n".join(fields["data"]), fields.get("id", [None])[0])
        )
    return events
