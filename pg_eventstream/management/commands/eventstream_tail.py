from __future__ import annotations

import os
import select
import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from django.core.management.base import CommandError

from pg_eventstream.channels import problem_of_name
from pg_eventstream.management.base import DatabaseCommand
from pg_eventstream.operate.events.lines import as_json, as_text
from pg_eventstream.operate.events.tail import Tail, TailedEvent, parse_since
from pg_eventstream.postgres.connector import Connector

#: Characters of the data that are read for a terminal: more than a line of it has.
_TERMINAL_CHARACTERS = 1000


class Command(DatabaseCommand):
    help = (
        "Shows events as they are put in order, until Ctrl-C: the time of the commit, the id that"
        " clients see, the type, the delay from the commit until the event was put in order (+),"
        " the time within which all proxies had taken it (<=), and the data."
    )

    # It must run where the checks find errors.
    requires_system_checks = []  # noqa: RUF012

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("channels", metavar="CHANNEL", nargs="*", help="exact names")
        parser.add_argument("--all", action="store_true", help="the events of all channels")
        parser.add_argument(
            "--since",
            metavar="PLACE",
            help="begin at an age (30s, 10m, 2h, 1d), after an event's id (CHANNEL:NUMBER), or with"
            " the earliest event that is stored (earliest); default is now",
        )
        parser.add_argument(
            "--json", action="store_true", help="one JSON object a line, with the whole data"
        )
        self.add_database_argument(parser)

    def run(self, alias: str, options: dict[str, Any]) -> None:
        channels: list[str] = options["channels"]
        if bool(channels) == options["all"]:
            raise CommandError("Name the channels to follow, or use --all for all of them.")
        for channel in channels:
            if problem := problem_of_name(channel):
                raise CommandError(f"The channel {channel!r} {problem}.")
        since = parse_since(options["since"], channels)
        if isinstance(since, dict) and channels and (others := since.keys() - set(channels)):
            raise CommandError(
                f"--since has an id of {', '.join(map(repr, sorted(others)))}, which is not among"
                " the channels to follow."
            )
        is_terminal = self.stdout.isatty() and not options["json"]
        tail = Tail(
            Connector(alias, limits=self.limits),
            None if options["all"] else channels,
            since,
            most=_TERMINAL_CHARACTERS if is_terminal else None,
            say=lambda message: self.stderr.write(message, self.style.WARNING),
        )
        with suppress(KeyboardInterrupt):
            try:
                for events in tail.follow():
                    if events:
                        self._show(events, as_json_lines=options["json"], is_terminal=is_terminal)
                    elif self._has_no_reader():
                        break
            except BrokenPipeError:
                _ignore_output()

    def _has_no_reader(self) -> bool:
        """Whether the output is a pipe whose reader has ended, as ``head`` does."""
        try:
            output = self.stdout.fileno()
        except (AttributeError, OSError):
            return False  # not a file: a test captures it
        poll = select.poll()
        poll.register(output, 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))

    def _show(
        self, events: Iterable[TailedEvent], *, as_json_lines: bool, is_terminal: bool
    ) -> None:
        encoding = getattr(self.stdout, "encoding", None) or "utf-8"
        # Read again for each event, because the window can be resized.
        width = shutil.get_terminal_size().columns if is_terminal else None
        for event in events:
            line = as_json(event) if as_json_lines else as_text(event, width)
            self.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding))
        self.stdout.flush()


def _ignore_output() -> None:
    """Prevent a second error, when Python flushes its output at the end.

    https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
