"""What becomes of our rows when ``loaddata`` or a test's ``serialized_rollback`` loads them.

Events are loaded as they are, and the trigger sends them. Of those that a loaded row gives a
place in the stream, nothing is sent: the cursor is told that it knows this database no longer,
so that the next call of ``pg_eventstream_sequence()`` takes as new what stands in the outbox and
not in the stream.
"""

from __future__ import annotations

from collections.abc import Iterable

from django.db import connections, models
from django.db.backends.base.base import BaseDatabaseWrapper

from ..postgres.locks import LOCK_SPACE, SEQUENCE_LOCK


class Loadable(models.Model):
    """A model that decides what is loaded of it. By default nothing.

    So it is for what holds only where it was written: how far a cluster's transactions are
    sequenced, who publishes, what a proxy has acknowledged.
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
        # A deserialised object calls Model.save_base(), past any method of ours; this one it
        # calls for the row itself.
        if raw and not self.load(connections[using or self._state.db or "default"]):
            return True
        saved: bool = super()._save_table(  # type: ignore[misc]
            raw, cls, force_insert, force_update, using, update_fields
        )
        return saved


def load_outbox_row(connection: BaseDatabaseWrapper, event_id: int, seq: int, trigger: str) -> None:
    """Put a loaded event into the outbox, in the order of those that are loaded with it.

    What the trigger has written for it is older then, and the newest row of an event counts.
    """
    with connection.cursor() as cursor:
        if connection.in_atomic_block:
            # Ours alone: the project's own constraints may be broken until all is loaded.
            name = connection.ops.quote_name(trigger)
            cursor.execute(f"SET CONSTRAINTS {name} IMMEDIATE")
        # Numbers of this database, above all that it has drawn, in the order of the dump's. The
        # dump's own order is another one: that of the key.
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


def may_take_place(
    connection: BaseDatabaseWrapper, position: int, channel: str, eid: int, event_id: int
) -> bool:
    """Whether a loaded place in the stream is new here, and an event's that has none yet.

    Outside of a transaction its event has been committed before, and may be sequenced; to find
    that out takes a look at the whole stream.
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
    """Have the next sequence() look what is new, and where the stream ends."""
    with connection.cursor() as cursor:
        # Whoever sequences meanwhile would write it anew, as if nothing had been loaded.
        cursor.execute(f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, {SEQUENCE_LOCK})")
        cursor.execute("UPDATE pg_eventstream_cursor SET cluster = 0 WHERE cluster <> 0")
