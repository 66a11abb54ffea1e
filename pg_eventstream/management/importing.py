"""Imports from django-eventstream what its clients need to resume: last ids and recent events.

It uses only the two tables of that package. The imported events are history: clients can resume
from them, and they expire, but they are never sequenced or published.
"""

from __future__ import annotations

import json
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
from ..sse import remove_line_breaks

_PAGE_EVENTS = 1000
_apps = Apps()  # a separate registry, so that it does not matter if django_eventstream is installed


class Event(models.Model):
    """An event stored by django-eventstream. Rows with eid 0 are its placeholders."""

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
    """The result of an import."""

    #: Channels that continue to count where they were.
    channels: int = 0
    #: Events that clients can resume from.
    events: int = 0
    #: Events that are young enough, but a later event of their channel is missing.
    before_gaps: int = 0
    #: Events that cannot be stored here; they count as missing.
    unusable: int = 0
    #: Channels that already have events here and are left unchanged.
    known: list[str] = field(default_factory=list)
    #: Channels that cannot exist here, with the reason.
    refused: dict[str, str] = field(default_factory=dict)


def missing_tables(source: str) -> list[str]:
    """The names of django-eventstream's tables that this database alias does not have."""
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
    """Import all channels of a database alias that have no events here, in one transaction.

    For each channel it imports the last eid, and the events younger than ``EVENTSTREAM_RETENTION``
    that precede it without a gap. Memory is bounded. No sender waits; the publisher waits during
    the last step.

    ``connection`` must be in autocommit mode and READ COMMITTED, as the owner of the tables. Raises
    `psycopg.Error` and `django.db.Error`.
    """
    imported = Imported()
    with connection.transaction(), connection.cursor() as cursor:
        _copy_counters(source, cursor, imported)
        _copy_events(source, cursor, imported, before_4_4)
        if not dry_run:
            say("All events are read. The publisher waits while they are written.")
            # Keeps sequence() out, so that no channel gets its first event here before it is
            # imported. Pruning can continue, because it only touches channels that have events.
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
            # django-eventstream up to 5.3.3 sent the type without removing these characters.
            event_type = remove_line_breaks(event_type) or "message"
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
    """The data that django-eventstream would have sent to a client that resumes.

    Its storage encodes its argument as JSON. Since 4.4 that argument is text: the JSON that
    send_event() makes for clients, or the unchanged text with ``json_encode=False``. Before 4.4 it
    was the value itself, so what is stored is what clients got (eventstream.py, send_event;
    storage.py, append_event; utils.py, sse_encode_event). A stored value that is not a string
    therefore is from before 4.4; for a string, ``before_4_4`` decides.

    Raises `ValueError` if ``stored`` is not JSON.
    """
    if before_4_4 or not stored.startswith('"'):
        return stored
    return str(json.loads(stored))


def _pages(rows: models.QuerySet[Any], *columns: str) -> Iterator[tuple[Any, ...]]:
    """Yield the rows, read in pages by their key: not every driver can stream a result."""
    last = 0
    while page := list(
        rows.filter(id__gt=last).order_by("id").values_list("id", *columns)[:_PAGE_EVENTS]
    ):
        yield from page
        last = page[-1][0]


def _choose(cursor: psycopg.Cursor[Any], imported: Imported) -> None:
    """Select the channels that can be imported, and their events that are kept."""
    # An event above its channel's counter counts as well, so that no id is used twice.
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
    # Counted down from the newest, eids are equal to tip, tip - 1, ... up to the first gap. Clocks
    # of different hosts can disagree, but pruning needs times that increase with the eids.
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
    imported.before_gaps = young - imported.events


def _write(cursor: psycopg.Cursor[Any]) -> None:
    """Write history at positions up to 0. Feeds and acknowledgements start above 0."""
    # The trigger puts each event into the outbox, from which it would be sequenced. Here it fires
    # at the end of the INSERT, so that its rows can be deleted before any session sees them.
    # (Disabling it would lock out all senders.) These events need no notification.
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
