"""Sends events: one INSERT in the caller's transaction, nothing else.

The event is delivered if and only if that transaction commits, after all events that were committed
before it. Sending takes no lock that another sender waits for and uses no network, and no daemon
needs to run: without a publisher, events wait.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import psycopg
from asgiref.sync import SyncToAsync, sync_to_async
from django.apps import apps
from django.conf import settings
from django.core.serializers.json import DjangoJSONEncoder
from django.db import DEFAULT_DB_ALIAS, DatabaseError, connections

from . import liveness, tracing
from .channels import NAME_LENGTH, RESERVED, problem_of_name
from .conf import conf
from .errors import InvalidEvent
from .postgres.connector import refuse_if_not_postgresql
from .sse import RESERVED_TYPES
from .users import skipped_ids

# A column that has its default is left out. This saves a parameter, and a role that sends no meta
# needs no right to do so.
_INSERT = "INSERT INTO pg_eventstream_event (channel, type, data) VALUES (%s, %s, %s)"
_INSERT_SKIPPING = (
    "INSERT INTO pg_eventstream_event (channel, type, data, skip_user_ids) VALUES (%s, %s, %s, %s)"
)
_INSERT_META = (
    "INSERT INTO pg_eventstream_event (channel, type, data, skip_user_ids, meta)"
    " VALUES (%s, %s, %s, %s, %s)"
)

_INSERT_MANY = """
    INSERT INTO pg_eventstream_event (channel, type, data, skip_user_ids)
    SELECT channel, type, data, ARRAY(SELECT jsonb_array_elements_text(skip::jsonb))
      FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[])
           WITH ORDINALITY AS new (channel, type, data, skip, nth)
     ORDER BY nth
"""
_INSERT_MANY_META = """
    INSERT INTO pg_eventstream_event (channel, type, data, skip_user_ids, meta)
    SELECT channel, type, data, ARRAY(SELECT jsonb_array_elements_text(skip::jsonb)), meta::jsonb
      FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[])
           WITH ORDINALITY AS new (channel, type, data, skip, meta, nth)
     ORDER BY nth
"""

# As JSON contains it, and not after a backslash that is itself escaped.
_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

#: The columns of an event: channel, type, data, ids of users to skip, and meta as JSON.
Row = tuple[str, str, str, list[str], str | None]


class NewEvent(NamedTuple):
    """An event to be sent by `send_events`, which also accepts plain tuples in this order."""

    channel: str
    event_type: str
    data: Any
    skip_user_ids: Iterable[object] | None = None
    json_encode: bool = True
    meta: Mapping[str, Any] | None = None


def send_event(
    channel: str,
    event_type: str,
    data: Any,
    skip_user_ids: Iterable[object] | None = None,
    async_publish: bool = True,
    json_encode: bool = True,
    using: str | None = None,
    *,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Send an event on ``channel``, in the current transaction of the database.

    Inside ``transaction.atomic()`` the event exists if and only if the block commits. Events of one
    transaction keep their order; events of different transactions are delivered in commit order.

    ``data`` is serialized by `DjangoJSONEncoder`. With ``json_encode=False`` it is a string that is
    sent unchanged. The users in ``skip_user_ids`` do not get the event: users or their primary
    keys, and None or an ``AnonymousUser`` for all visitors who are not logged in. (The text
    ``"anonymous"`` stands for these visitors and for a user with that primary key.) ``using`` is a
    database alias, by default ``EVENTSTREAM_DATABASE``. ``async_publish`` has no effect, because
    nothing is published here; it exists for callers written for django-eventstream.

    ``meta`` is a mapping about the event that is stored with it and never sent to clients, such as
    correlation and causation ids. It is serialized like the data. Within a trace of OpenTelemetry,
    ``traceparent`` and ``tracestate`` are added.

    Raises `InvalidEvent` (a ``ValueError``) if a name is empty, too long, contains a line break or
    NUL, or is reserved (types such as ``stream-error``), if the data or the meta cannot be stored,
    or if a user to skip has no primary key. Nothing is written then.
    """
    insert(to_row(NewEvent(channel, event_type, data, skip_user_ids, json_encode, meta)), using)


async def asend_event(
    channel: str,
    event_type: str,
    data: Any,
    skip_user_ids: Iterable[object] | None = None,
    async_publish: bool = True,
    json_encode: bool = True,
    using: str | None = None,
    *,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """`send_event` for asynchronous code, with the same guarantees, on Django's database thread."""
    await sync_to_async(send_event)(
        channel, event_type, data, skip_user_ids, json_encode=json_encode, using=using, meta=meta
    )


def _forget_parent() -> None:
    """Replace asgiref's executor in a process that was forked, which does not have its thread."""
    SyncToAsync.single_thread_executor = ThreadPoolExecutor(max_workers=1)


os.register_at_fork(after_in_child=_forget_parent)


def send_events(events: Iterable[NewEvent | tuple[Any, ...]], using: str | None = None) -> None:
    """Send many events in one statement, in the given order. See `send_event`.

    If one of them is refused, none is written.
    """
    insert_many([to_row(_new_event(event)) for event in events], using)


def _new_event(event: NewEvent | tuple[Any, ...]) -> NewEvent:
    try:
        return NewEvent(*event)
    except TypeError as e:
        raise InvalidEvent(
            "An event must be a tuple (channel, event_type, data, skip_user_ids, json_encode,"
            f" meta), of which the last three are optional; it is {event!r}."
        ) from e


def insert(row: Row, using: str | None) -> None:
    """Write one event unchanged."""
    statement, count = (_INSERT_SKIPPING, 4) if row[3] else (_INSERT, 3)
    if row[4] is not None:
        statement, count = _INSERT_META, 5
    alias = using or conf.database
    with connections[alias].cursor() as cursor, _ExplainErrors(alias):
        cursor.execute(statement, row[:count])
    if settings.DEBUG:
        liveness.check_publisher()


def insert_many(rows: Sequence[Row], using: str | None) -> None:
    """Write events unchanged, in one statement."""
    if not rows:
        return
    channels, types, texts, skips, metas = zip(*rows, strict=True)
    values = [list(channels), list(types), list(texts), [json.dumps(ids) for ids in skips]]
    if has_meta := any(meta is not None for meta in metas):
        values.append(list(metas))
    alias = using or conf.database
    with connections[alias].cursor() as cursor, _ExplainErrors(alias):
        # Few parameters for any number of events, because the protocol allows 65,535 in a
        # statement. The user ids are sent as JSON, because unnest() would flatten a list of lists.
        cursor.execute(_INSERT_MANY_META if has_meta else _INSERT_MANY, values)
    if settings.DEBUG:
        liveness.check_publisher()


class _ExplainErrors:
    """Adds to the error for missing tables how to create them. A class, which is fast to enter."""

    __slots__ = ("alias",)

    def __init__(self, alias: str) -> None:
        self.alias = alias

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, DatabaseError):
            return
        refuse_if_not_postgresql(self.alias)
        if isinstance(error.__cause__, psycopg.errors.UndefinedTable):
            missing = (
                ""
                if apps.is_installed("pg_eventstream")
                else (' Add "pgtrigger" and "pg_eventstream" to INSTALLED_APPS, then:')
            )
            elsewhere = "" if self.alias == DEFAULT_DB_ALIAS else f" --database {self.alias}"
            raise type(error)(
                f"{error} The database {self.alias!r} has no table for events in this role's"
                f" search_path.{missing} python manage.py migrate pg_eventstream{elsewhere}"
            ) from error.__cause__


def to_row(event: NewEvent) -> Row:
    channel = check_name("channel", event.channel)
    if channel.startswith(RESERVED):
        raise InvalidEvent(f"Channel names that begin with {RESERVED!r} are reserved.")
    event_type = check_name("event type", event.event_type)
    if event_type in RESERVED_TYPES:
        raise InvalidEvent(
            f"The event type {event_type!r} is reserved for messages of the server about the"
            f" stream. Use another name than {', '.join(RESERVED_TYPES)}."
        )
    return (
        channel,
        event_type,
        _text(event.data, event.json_encode),
        _user_ids(event.skip_user_ids),
        _meta(tracing.add_trace(event.meta)),
    )


def parse_json(text: str) -> Any:
    """The value of JSON as browsers parse it, without NaN and Infinity. Raises ValueError."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def check_name(what: str, value: str) -> str:
    """Return the name if it is valid for a channel or an event type; else raise `InvalidEvent`."""
    if not isinstance(value, str):
        raise InvalidEvent(f"The {what} must be a string, not {type(value).__name__}.")
    if problem := problem_of_name(value):
        shown = f" {value!r}" if 0 < len(value) <= NAME_LENGTH else ""
        raise InvalidEvent(f"The {what}{shown} {problem}.")
    return value


def _text(data: Any, json_encode: bool) -> str:
    if json_encode:
        try:
            # NaN and Infinity are not JSON; a browser's JSON.parse would fail on them.
            return json.dumps(data, cls=DjangoJSONEncoder, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise InvalidEvent(
                f"The data cannot be serialized as JSON: {e}. Convert it first, or pass a string"
                " and json_encode=False."
            ) from e
    if not isinstance(data, str):
        raise InvalidEvent(
            f"With json_encode=False the data must be a string, not {type(data).__name__}."
        )
    if "\0" in data:
        raise InvalidEvent("The data must not contain NUL; PostgreSQL cannot store it in text.")
    return _encodable("data", data)


def _encodable(what: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise InvalidEvent(f"The {what} is not valid Unicode: {e}.") from e
    return value


def _meta(meta: Mapping[str, Any] | None) -> str | None:
    if meta is None:
        return None
    if not isinstance(meta, Mapping) or not all(isinstance(key, str) for key in meta):
        raise InvalidEvent(
            f"The meta of an event must be a mapping with strings as keys; it is {meta!r}."
        )
    try:
        text = json.dumps(meta, cls=DjangoJSONEncoder, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as e:
        raise InvalidEvent(f"The meta of an event cannot be serialized as JSON: {e}.") from e
    if _ESCAPED_NUL.search(text):
        raise InvalidEvent("The meta must not contain NUL; PostgreSQL cannot store it in jsonb.")
    return _encodable("meta", text)


def _user_ids(skip_user_ids: Iterable[object] | None) -> list[str]:
    if skip_user_ids is None:
        return []
    if isinstance(skip_user_ids, str | bytes) or not isinstance(skip_user_ids, Iterable):
        kind = "string" if isinstance(skip_user_ids, str) else type(skip_user_ids).__name__
        raise InvalidEvent(
            f"skip_user_ids must be a list of user ids, not the {kind} {skip_user_ids!r}."
        )
    ids = [
        _encodable("user id", user_id) for user in skip_user_ids for user_id in skipped_ids(user)
    ]
    if any("\0" in user_id for user_id in ids):
        raise InvalidEvent("A user id must not contain NUL.")
    return ids
