"""Events of the types that are reserved for the server."""

from __future__ import annotations

from tests.support.database import Database

TYPES = ["stream-open", "stream-reset", "stream-error", "keep-alive", "event-erased"]
CONSTRAINT = "pg_eventstream_type_not_reserved"


def send_as_before(database: Database, channel: str) -> None:
    """Send an event of each type, which the table used to accept, between other events."""
    with database.connect(autocommit=False) as sender:
        sender.execute(f"ALTER TABLE pg_eventstream_event DROP CONSTRAINT {CONSTRAINT}")
        for event_type in ["message", *TYPES, "message"]:
            sender.execute(
                "INSERT INTO pg_eventstream_event (channel, type, data) VALUES (%s, %s, %s)",
                [channel, event_type, '{"condition": "forbidden"}'],
            )
        sender.execute("SET CONSTRAINTS ALL IMMEDIATE")
        sender.execute(
            f"ALTER TABLE pg_eventstream_event ADD CONSTRAINT {CONSTRAINT} CHECK"
            f" (type NOT IN ({', '.join(map(repr, TYPES))})) NOT VALID"
        )
