"""Decides which rows ``loaddata`` or a test's ``serialized_rollback`` loads.

Events are loaded unchanged, and the trigger sends them, except events that a loaded row of the
stream already gives a place. To that end the cursor forgets this database: the next call of
``pg_eventstream_sequence()`` then takes as new all events that are in the outbox and not in the
stream.
"""

from __future__ import annotations

from collections.abc import Iterable

from django.db import connections, models
from django.db.backends.base.base import BaseDatabaseWrapper

from ..postgres.locks import LOCK_SPACE, SEQUENCE_LOCK


class Loadable(models.Model):
    """A model that decides which of its rows are loaded: by default none.

    The default is for rows that are valid only where they were written: how far a cluster's
    transactions are sequenced, who publishes, what a proxy has acknowledged.
    """

    class Meta:
        abstract = True

    def load(self, connection: BaseDatabaseWrapper) -> bool:
        """Whether to save the row as it was dumped."""
        return False

    def _save_table(
        self,
        raw: bool = False,
        cls: type[models.Model] | None = None,
        force_insert: bool = False,
        force_update: bool = False,
        using: str | None = None,
        update_fields: Iterable[str] | None = None,
    ) -> bool:
        # A deserialized object calls Model.save_base(), which bypasses save() and calls this
        # method to write the row.
        if raw and not self.load(connections[using or self._state.db or "default"]):
            return True
        saved: bool = super()._save_table(  # type: ignore[misc]
            raw, cls, force_insert, force_update, using, update_fields
        )
        return saved


def load_outbox_row(connection: BaseDatabaseWrapper, event_id: int, seq: int, trigger: str) -> None:
    """Put a loaded event into the outbox, in the order of the events that are loaded with it.

    The row that the trigger wrote for it is then the older one; the newest row of an event counts.
    """
    with connection.cursor() as cursor:
        if connection.in_atomic_block:
            # Only this one: the project's own constraints can be violated until all is loaded.
            name = connection.ops.quote_name(trigger)
            cursor.execute(f"SET CONSTRAINTS {name} IMMEDIATE")
        # Numbers of this database, above all that it has drawn, in the order of the numbers in
        # the dump. The rows of a dump are in another order, that of the key.
        cursor.execute(
            """
            WITH drawn AS MATERIALIZED (
                SELECT coalesce(
                           nullif(current_setting('pg_eventstream.loaded_above', true), ''),
                           set_config('pg_eventstream.loaded_above', nextval(name)::text, true)
                       )::bigint AS seq, name::regclass
                  FROM pg_get_serial_sequence('pg_eventstream_outbox', 'seq') AS name
            ),
            loaded AS (
                INSERT INTO pg_eventstream_outbox (xid, seq, event_id, channel)
                OVERRIDING SYSTEM VALUE
                SELECT pg_current_xact_id(), drawn.seq + %s, id, channel
                  FROM drawn, pg_eventstream_event WHERE id = %s
                RETURNING seq
            )
            SELECT setval(name, greatest(loaded.seq, pg_sequence_last_value(name)))
              FROM loaded, drawn
            """,
            [seq, event_id],
        )
    forget_cursor(connection)


def can_load_place(
    connection: BaseDatabaseWrapper, position: int, channel: str, eid: int, event_id: int
) -> bool:
    """Whether a loaded row of the stream is new here, and its event has no place yet.

    Outside of a transaction the event was committed earlier and could be sequenced already. To
    find that out, the whole stream is read.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT EXISTS (SELECT FROM pg_eventstream_event WHERE id = %(event_id)s)
               AND NOT EXISTS (SELECT FROM pg_eventstream_stream
                                WHERE (channel, eid) = (%(channel)s, %(eid)s)
                                  AND (position, event_id) = (%(position)s, %(event_id)s))
               AND (%(atomic)s OR NOT EXISTS (
                       SELECT FROM pg_eventstream_stream WHERE event_id = %(event_id)s))
            """,
            {
                "position": position,
                "channel": channel,
                "eid": eid,
                "event_id": event_id,
                "atomic": connection.in_atomic_block,
            },
        )
        return bool(cursor.fetchone()[0])


def forget_cursor(connection: BaseDatabaseWrapper) -> None:
    """Make the next sequence() find out which events are new and where the stream ends."""
    with connection.cursor() as cursor:
        # A session that sequences at the same time would write the cursor again, as if nothing
        # had been loaded.
        cursor.execute(f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, {SEQUENCE_LOCK})")
        cursor.execute("UPDATE pg_eventstream_cursor SET cluster = 0 WHERE cluster <> 0")
