"""The stream of the doctor's probes: the token that opens it, and what the endpoint tells.

``manage.py eventstream_doctor`` opens a stream as clients do, with a token in the query. The token
opens the channel `channels.DOCTOR` and nothing else, and nothing else opens that channel.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from django.core import signing
from django.db import connections

from . import sse
from .conf import conf
from .errors import InvalidRequest

#: The parameter of the query. A project's own parameters must not collide with it.
PARAMETER = "eventstream-doctor"
#: The type of the event in which the endpoint describes itself to the doctor.
DESCRIPTION = "doctor"
#: Begins each response by which a stream of the doctor continues. A comment, in clients' terms.
CONTINUED = ": continued\n\n"

_SALT = "pg_eventstream.doctor"
_CONTENT = "open"
_SECONDS = 300
# How far the doctor's clock may be ahead.
_AHEAD_SECONDS = 60

# Identifies the table that holds the events, among all databases of all servers.
_TABLE = """
    SELECT concat_ws('/', system_identifier, pg_database.oid,
                     'pg_eventstream_event'::regclass::oid)
      FROM pg_control_system(), pg_database WHERE datname = current_database()
"""


class TokenRefused(InvalidRequest):
    """A token of the doctor is not valid. ``reason`` is "key" or "clock"."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


def make_token() -> str:
    """A token that opens the doctor's stream for five minutes."""
    return signing.TimestampSigner(salt=_SALT).sign(_CONTENT)


def check_token(token: str) -> None:
    """Raise `TokenRefused` if this is not a token of the doctor, or has expired."""
    try:
        content = signing.TimestampSigner(salt=_SALT).unsign(token)
        made_at = signing.b62_decode(token.split(":")[1])
    except (signing.BadSignature, IndexError, ValueError):
        content, made_at = "", 0
    if content != _CONTENT:
        raise TokenRefused(
            "key",
            "The token of the doctor was not made with the SECRET_KEY of this application",
        )
    age = time.time() - made_at
    if not -_AHEAD_SECONDS <= age <= _SECONDS:
        raise TokenRefused(
            "clock",
            f"The token of the doctor has expired, or the clocks differ: it is {age:.0f} seconds"
            " old by the clock of this application",
        )


def is_valid(token: str) -> bool:
    """Whether this is a token of the doctor."""
    try:
        check_token(token)
    except TokenRefused:
        return False
    return True


def identify_table(alias: str | None = None) -> str:
    """Identify the table that holds the events. Equal texts mean the same table."""
    with connections[alias or conf.database].cursor() as cursor:
        cursor.execute(_TABLE)
        row = cursor.fetchone()
    assert row is not None  # noqa: S101
    return str(row[0])


def describe(
    *,
    proxied: bool,
    table: str | None = None,
    next_link: str | None = None,
    unverified: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What the endpoint tells the doctor about itself.

    ``unverified`` says why the signature of a proxy does not count: code, reason and remedy.
    """
    return {
        "proxied": proxied,
        "table": table,
        "next_link": next_link,
        "unverified": list(unverified) if unverified else None,
        "grip_prefix": conf.grip_prefix,
        "time": time.time(),
    }


def encode(description: dict[str, Any]) -> str:
    """The description as the first event of the doctor's stream."""
    return sse.encode_event(DESCRIPTION, json.dumps(description))
