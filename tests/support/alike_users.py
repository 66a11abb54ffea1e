"""Users whose names look alike, and requests of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User

from tests.support.environment import settings_everywhere

MANAGER = {"EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channelmanagers.TextKeys"}
#: Users whose names look alike; None is a visitor.
KEYS = [None, "anonymous", r"\anonymous", r"\\anonymous", "Anonymous", "anonymous ", "None", "1"]


@pytest.fixture(autouse=True)
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with settings_everywhere(monkeypatch, **MANAGER):
        yield


def user(key: str | None) -> Any:
    return None if key is None else User(pk=key, username=key)


def headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"X-User": key}
