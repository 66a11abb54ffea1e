"""runserver_ngrok with a Pushpin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.management.base import CommandError
from django.test import override_settings

from pg_eventstream.servers.pushpin import Pushpin
from tests.support.environment import KEY
from tests.support.ngrok import Service, run, tunnel


@pytest.fixture
def ngrok() -> Iterator[Service]:
    with Service() as service:
        service.body = json.dumps({"tunnels": [tunnel("https://1b2c.ngrok.example")]})
        yield service


class Served(Exception):
    """Raised instead of serving."""


@pytest.fixture(autouse=True)
def stop_before_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    from django.core.management.commands import runserver

    def serve(*args: Any, **kwargs: Any) -> None:
        raise Served

    monkeypatch.setattr(runserver.Command, "inner_run", serve)


def test_pushpin_needs_no_tunnel_and_the_command_says_so(ngrok: Service, pushpin: Pushpin) -> None:
    with (
        override_settings(GRIP_URL=f"{pushpin.control_url}?key={KEY}"),
        pytest.raises(CommandError, match=r"Pushpin needs no tunnel.*localhost:8000.*runserver"),
    ):
        run(ngrok)
