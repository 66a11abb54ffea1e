"""The previous sequence(): a whole backlog in one statement, with a lock on the cursor's table."""

from __future__ import annotations

from pathlib import Path

import pg_eventstream

from .servers import Database

BEFORE = Path(pg_eventstream.__file__).parent / "sql" / "0005_sequence.sql"


def sequence_as_before(database: Database) -> None:
    with database.connect() as connection:
        connection.execute(BEFORE.read_text(encoding="utf-8"))
