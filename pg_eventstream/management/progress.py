"""A line on a terminal that shows how far a command is."""

from __future__ import annotations

import time

from django.core.management.base import OutputWrapper


class Progress:
    """A line that is written again and again: a bar if the total is known."""

    _WIDTH = 30
    _SECONDS = 0.1

    def __init__(self, out: OutputWrapper) -> None:
        self._out = out
        self._shown_at = 0.0
        self._shown = False

    def show(self, text: str, share: float | None = None) -> None:
        """Show the text, with a bar for the share that is done (0 to 1)."""
        if time.monotonic() < self._shown_at + self._SECONDS:
            return
        self._shown_at, self._shown = time.monotonic(), True
        bar = ""
        if share is not None:
            share = min(share, 1.0)
            bar = f"[{'#' * round(share * self._WIDTH):<{self._WIDTH}}] {share:4.0%}  "
        # A shorter text must not leave the end of a longer one.
        self._out.write(f"\r{bar}{text}\x1b[K", str, ending="")
        self._out.flush()

    def end(self) -> None:
        """Remove the line."""
        if self._shown:
            self._out.write("\r\x1b[K", str, ending="")
            self._out.flush()
