"""A publisher in a separate process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from pg_eventstream.servers.processes import wait_until
from tests.support.forked import ForkedProcess

#: The messages about a proxy in its log.
BACK = "takes events again"
UNREACHABLE = "cannot be reached: "


class PublisherProcess(ForkedProcess):
    """``manage.py eventstream_publisher`` in a separate process."""

    def __init__(self, log_path: Path, environment: dict[str, str], *arguments: str) -> None:
        super().__init__(
            "the publisher",
            [sys.executable, "-m", "django", "eventstream_publisher", *arguments],
            log_path=log_path,
            environment=environment,
        )
        self.log_file = log_path

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def lines_with(self, text: str) -> int:
        """The number of lines in the log that contain the text."""
        return sum(text in line for line in self.log.splitlines())

    def wait_for_log(self, text: str, timeout: float = 60) -> None:
        try:
            wait_until(lambda: text in self.log or not self.running, timeout=timeout)
        except TimeoutError:
            raise self.error(f"did not say {text!r}") from None
        assert text in self.log, self.error(f"did not say {text!r}")

    def lead(self) -> PublisherProcess:
        """Start, and wait until it leads."""
        self.start()
        self.wait_for_log(": leading")
        return self


#: Makes publishers that end with the test (the fixture ``new_publisher``).
NewPublisher = Callable[..., PublisherProcess]
