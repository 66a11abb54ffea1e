"""A stream below a path with odd characters, through a proxy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.test import override_settings

from pg_eventstream import send_events
from pg_eventstream.servers.processes import Process
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.origin import behind_a_proxy
from tests.support.publisher import PublisherProcess
from tests.support.sse_client import SSEClient


@pytest.fixture(autouse=True)
def mounted(database: Database) -> Iterator[None]:
    with behind_a_proxy, override_settings(ROOT_URLCONF="tests.project.url_forms"):
        yield


def test_stream_below_a_path_with_odd_characters_is_recovered_there(
    publisher: PublisherProcess, app: Process, pushpin: Pushpin, channel: str
) -> None:
    url = f"{pushpin.url}/rooms/{channel}%20%C3%BC%2C%3B%25/events/"
    with SSEClient(url) as client:
        client.wait_open()
        name = f"{channel} ü,;%"
        assert client.control[0].eids == {name: 0}
        texts = ["too large to be published" * 20_000, "small"]
        send_events([(name, "message", text, None, False) for text in texts])
        assert [event.data for event in client.wait_count(2)] == texts
