"""No data of events in the log: what the publisher logs in all kinds of trouble."""

from __future__ import annotations

import logging

import pytest
from django.test import override_settings

from pg_eventstream import send_event
from pg_eventstream.errors import EventStreamError
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.rounds import prune, publish_once

SECRET = "swordfish"


@override_settings(
    EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.Volatile",
    EVENTSTREAM_RETENTION=1,
)
def test_data_of_events_is_not_logged(
    database: Database, control: ControlPort, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pg_eventstream")
    control.refused = SECRET
    control.answers = [503]
    send_event("a", "message", SECRET, skip_user_ids=[SECRET], meta={"about": SECRET})
    send_event("volatile", "message", SECRET * 100_000)
    for change in (SECRET, f'{{"user": "{SECRET}"}}', f'{{"user": "{SECRET}", "channel": "a"}}'):
        database.send("pg_eventstream:permission", change)
    with database.connect() as other:
        other.execute("SET session_replication_role = replica")
        other.execute(
            "INSERT INTO pg_eventstream_event (channel, data, created)"
            " VALUES ('a', %s, now() - interval '1 day')",
            [SECRET],
        )
    with pytest.raises(EventStreamError) as refusal:
        publish_once()
    assert SECRET not in str(refusal.value)
    prune()
    events = {getattr(record, "event", None) for record in caplog.records}
    assert {
        "proxy-unavailable", "proxy-refused", "permission-change-invalid",
        "event-too-large", "events-not-seen",
    } <= events  # fmt: skip
    formatter = logging.Formatter()
    for record in caplog.records:
        assert SECRET not in formatter.format(record), record.event  # type: ignore[attr-defined]
        assert SECRET not in str(vars(record))
