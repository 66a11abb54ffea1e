"""The log of the library."""

from __future__ import annotations

from typing import Any

import pytest

from pg_eventstream import liveness

OTHER_KEY = "another key, which no proxy of ours has"
Log = pytest.LogCaptureFixture


def said(log: Log, module: Any) -> list[str]:
    return [record.getMessage() for record in log.records if record.name == module.logger.name]


# A publisher that does not run


START = "python manage.py eventstream_publisher"


def look(log: Log) -> list[str]:
    liveness._check()
    return said(log, liveness)
