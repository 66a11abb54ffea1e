"""Carry over from django-eventstream what its clients hold: ids, and what they missed.

It knows of that package only the two tables. What it takes over is history: it can be
resumed from and expires, but is never sequenced or published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
from django.apps.registry import Apps
from django.db import connections, models
from django.utils import timezone

from ..conf import conf
from ..errors import InvalidEvent
from ..postgres.locks import LOCK_SPACE, SEQUENCE_LOCK
from ..send import NewEvent, to_row

_PAGE_EVENTS = 1000
_LINE_BREAK_OR_NUL = re.compile(r"[\r\n\0]")
_apps = Apps()  # of our own, whether or not django_eventstream is installed


class Event(models.Model):
    """An event that django-eventstream has stored; eid 0 is a placeholder of its own."""

    id = models.AutoField(primary_key=True)
    channel = models.TextField()
    type = models.TextField()
    data = models.TextField()
    eid = models.BigIntegerField()
    created = models.DateTimeField()
    objects: models.Manager[Event] = models.Manager()

    class Meta:
        apps = _apps
        app_label = "django_eventstream"
        db_table = "django_eventstream_event"
        managed = False

    def __str__(self) -> str:
        return f"{self.channel}:{self.eid}"


class Counter(models.Model):
    """The last eid of a channel."""

    id = models.AutoField(primary_key=True)
    name = models.TextField()
    value = models.BigIntegerField()
    objects: models.Manager[Counter] = models.Manager()

    class Meta:
        apps = _apps
        app_label = "django_eventstream"
        db_table = "django_eventstream_eventcounter"
        managed = False

    def __str__(self) -> str:
        return f"{self.name}:{self.value}"


@dataclass(slots=True)
class Imported:
    """What became of it.

    ``channels`` go on counting where they were, with ``events`` to resume from; ``behind_gaps``
    are younger than the retention, but a later one of their channel is missing, and
    ``unusable`` are among those missing. ``known`` channels had events here already and are
    as they were, ``refused`` cannot exist here: name and reason.
    """

    channels: int = 0
    events: int = 0
    behind_gaps: int = 0
    unusable: int = 0
    known: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def missing_tables(source: str) -> list[str]:
    """Those of django-eventstream's tables that the database alias does not have."""
    present = connections[source].introspection.table_names()
    return [m._meta.db_table for m in (Event, Counter) if m._meta.db_table not in present]


def import_events(
    source: str,
    connection: psycopg.Connection[Any],
    *,
    before_4_4: bool = False,
    dry_run: bool = False,
    say: Callable[[str], object] = lambda message: None,
) -> Imported:
    """Import all channels of a database alias that are not known here, or nothing at all.

    Per channel it takes the last eid, and the events younger than ``EVENTSTREAM_RETENTION``
    that lead up to it without a gap. Memory is bounded; no sender waits, the publisher
    does, for the last step.

    ``connection`` is in autocommit mode and READ COMMITTED, as the owner of our tables. Raises
    `psycopg.Error` and `django.db.Error`.
    """
    imported = Imported()
    with connection.transaction(), connection.cursor() as cursor:
        _copy_counters(source, cursor, imported)
        _copy_events(source, cursor, imported, before_4_4)
        if not dry_run:
            say("All is read. The publisher waits while it is written.")
            # Keeps sequence() out: what is unknown here stays so until it is imported. The
            # sweep may go on, since it only touches channels that are known.
            cursor.execute(f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, {SEQUENCE_LOCK})")
        _choose(cursor, imported)
        if not dry_run:
            _write(cursor)
    return imported


def _copy_counters(source: str, cursor: psycopg.Cursor[Any], imported: Imported) -> None:
    cursor.execute(
        "CREATE TEMP TABLE old_channel (name text PRIMARY KEY, tip bigint) ON COMMIT DROP"
    )
    with cursor.copy("COPY old_channel FROM STDIN") as copy:
        for _, name, value in _pages(Counter.objects.using(source), "name", "value"):
            try:
                to_row(NewEvent(name, "message", "", json_encode=False))
            except InvalidEvent as e:
                imported.refused[name] = str(e)
            else:
                copy.write_row((name, value))


def _copy_events(
    source: str, cursor: psycopg.Cursor[Any], imported: Imported, before_4_4: bool
) -> None:
    cursor.execute(
        "CREATE TEMP TABLE old_event"
        " (channel text, eid bigint, type text, data text, created timestamptz) ON COMMIT DROP"
    )
    young = Event.objects.using(source).filter(eid__gt=0)
    if (retention := conf.retention) is not None:
        young = young.filter(created__gte=timezone.now() - retention)
    rows = _pages(young, "channel", "eid", "type", "data", "created")
    with cursor.copy("COPY old_event FROM STDIN") as copy:
        for _, channel, eid, event_type, data, created in rows:
            if channel in imported.refused:
                continue
            # Up to 5.3.3 nothing was removed from the type before it was sent.
            event_type = _LINE_BREAK_OR_NUL.sub("", event_type) or "message"
            try:
                text = _text_on_the_wire(data, before_4_4)
                to_row(NewEvent(channel, event_type, text, json_encode=False))
            except ValueError:
                imported.unusable += 1
                continue
            if timezone.is_naive(created):  # USE_TZ = False
                created = timezone.make_aware(created)
            copy.write_row((channel, eid, event_type, text, created))


def _text_on_the_wire(stored: str, before_4_4: bool) -> str:
    """What django-eventstream would have sent when a client resumed.

    Its storage keeps JSON of what it is given, and is given text since 4.4: send_event()
    writes the JSON that clients get, or with ``json_encode=False`` takes text as it is.
    Earlier it was given the value itself, and what is stored is what clients got
    (eventstream.py, send_event; storage.py, append_event; utils.py, sse_encode_event).
    So a value that is no string tells its age, a string does not.

    Raises `ValueError` if it is not JSON.
    """
    if before_4_4 or not stored.startswith('"'):
        return stored
    return str(json.loads(stored))


def _pages(rows: models.QuerySet[Any], *columns: str) -> Iterator[tuple[Any, ...]]:
    """The rows in pages, by their key: not every driver reads a result piece by piece."""
    last = 0
    while page := list(
        rows.filter(id__gt=last).order_by("id").values_list("id", *columns)[:_PAGE_EVENTS]
    ):
        yield from page
        last = page[-1][0]


def _choose(cursor: psycopg.Cursor[Any], imported: Imported) -> None:
    """Narrow down to the channels that can be imported, and to their events to be kept."""
    # No id may be given out twice: an event above its counter counts as well.
    cursor.execute(
        """
        INSERT INTO old_channel AS old SELECT channel, max(eid) FROM old_event GROUP BY channel
        ON CONFLICT (name) DO UPDATE SET tip = greatest(old.tip, excluded.tip)
        """
    )
    cursor.execute("DELETE FROM old_channel WHERE tip <= 0")
    cursor.execute(
        """
        DELETE FROM old_channel AS old
         WHERE EXISTS (SELECT FROM pg_eventstream_channel AS known WHERE known.name = old.name)
            OR EXISTS (SELECT FROM pg_eventstream_stream WHERE channel = old.name)
        RETURNING name
        """
    )
    imported.known = sorted(name for (name,) in cursor)
    # Counted down from the newest, eids are equal to tip, tip - 1, ... up to the first gap.
    # Clocks of different hosts may disagree; the sweep needs times that rise with the eids.
    cursor.execute(
        """
        CREATE TEMP TABLE old_tail ON COMMIT DROP AS
        SELECT channel, eid, type, data, created,
               max(least(created, statement_timestamp()))
                   OVER (PARTITION BY channel ORDER BY eid) AS sequenced_at
          FROM (SELECT *, row_number() OVER (PARTITION BY channel ORDER BY eid DESC) AS nth
                  FROM old_event JOIN old_channel ON name = channel) AS counted
         WHERE eid = tip + 1 - nth
        """
    )
    cursor.execute(
        """
        SELECT (SELECT count(*) FROM old_channel), (SELECT count(*) FROM old_tail),
               (SELECT count(*) FROM old_event JOIN old_channel ON name = channel)
        """
    )
    imported.channels, imported.events, young = cursor.fetchone() or (0, 0, 0)
    imported.behind_gaps = young - imported.events


def _write(cursor: psycopg.Cursor[Any]) -> None:
    """Write history: positions up to 0, which feeds and their acknowledgements begin above."""
    # The trigger puts each event into the outbox, from where it would be sequenced. Here it
    # fires at the end of the INSERT, so that its rows can be deleted before anyone sees them.
    # To disable it instead would lock all senders out. There is nothing to ring for.
    cursor.execute("SET LOCAL pg_eventstream.bell = off")
    cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
    cursor.execute(
        """
        WITH placed AS MATERIALIZED (
            SELECT *, nextval(pg_get_serial_sequence('pg_eventstream_event', 'id')) AS event_id,
                   least((SELECT min(position) FROM pg_eventstream_stream), 1)
                   - row_number() OVER (ORDER BY sequenced_at DESC, channel DESC, eid DESC)
                   AS position
              FROM old_tail
        ),
        said AS (
            INSERT INTO pg_eventstream_event (id, channel, type, data, created)
            SELECT event_id, channel, type, data, created FROM placed
        ),
        sequenced AS (
            INSERT INTO pg_eventstream_stream (position, channel, eid, event_id, sequenced_at)
            SELECT position, channel, eid, event_id, sequenced_at FROM placed
        )
        INSERT INTO pg_eventstream_channel (name, pruned)
        SELECT name, coalesce(min(eid) - 1, tip)
          FROM old_channel LEFT JOIN placed ON channel = name
         GROUP BY name
        """
    )
    cursor.execute("DELETE FROM pg_eventstream_outbox WHERE xid = pg_current_xact_id()")
