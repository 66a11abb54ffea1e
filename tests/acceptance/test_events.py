"""Streams from the earliest event that is kept."""

from __future__ import annotations

from pg_eventstream import (
    send_event,
    send_events,
)
from tests.support.database import Database
from tests.support.publisher import PublisherProcess
from tests.support.sse_client import OpenStream


def test_stream_from_the_earliest_continues_live(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    texts = [f"{n} {'x' * 500}" for n in range(300)]  # several pages
    send_events([(channel, "message", text, None, False) for text in texts])
    client = stream(channel, f"{channel}quiet", last_event_id="earliest")
    client.wait_count(len(texts))
    send_event(channel, "message", "live", json_encode=False)
    client.wait_count(len(texts) + 1)
    assert [event.data for event in client.events] == [*texts, "live"]
    assert client.connections == 1
