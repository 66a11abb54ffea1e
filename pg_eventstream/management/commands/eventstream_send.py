from __future__ import annotations

import os
import stat
import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import CommandError
from django.db import Error

from pg_eventstream.management.base import DatabaseCommand
from pg_eventstream.management.progress import Progress
from pg_eventstream.management.sending import Sender
from pg_eventstream.send import parse_json, send_event


class Command(DatabaseCommand):
    help = (
        "Sends one event, or with - the events in the lines of standard input. Each line is a JSON"
        ' object: {"channel": …, "type": …, "data": …, "skip_user_ids": […], "meta": {…}}, of'
        " which only channel and data are required."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("channel", metavar="CHANNEL", help="or - to read lines")
        parser.add_argument("type", metavar="TYPE", nargs="?", help="such as message")
        parser.add_argument(
            "data", metavar="DATA", nargs="?", help="JSON, which is sent as it is written"
        )
        parser.add_argument(
            "--text",
            action="store_true",
            help="the data is any text instead of JSON; in lines, a string that is sent unchanged",
        )
        parser.add_argument(
            "--skip",
            metavar="USER_ID",
            action="append",
            help="a user who does not get the event; can be repeated",
        )
        parser.add_argument(
            "--batch",
            metavar="N",
            type=int,
            help="with -: commit each N events; default is one transaction for all",
        )
        self.add_database_argument(parser)

    def run(self, alias: str, options: dict[str, Any]) -> None:
        if options["channel"] == "-":
            self._send_lines(alias, options)
        else:
            self._send_one(alias, options)

    def _send_one(self, alias: str, options: dict[str, Any]) -> None:
        channel, event_type, data = options["channel"], options["type"], options["data"]
        if event_type is None or data is None:
            raise CommandError(
                "Give CHANNEL, TYPE and DATA, or - alone to read events from standard input."
            )
        if options["batch"] is not None:
            raise CommandError("--batch is only for events from standard input (-).")
        if not options["text"]:
            try:
                parse_json(data)
            except ValueError as e:
                raise CommandError(
                    f"DATA is not JSON: {e}. To send it as it is, use --text. A JSON string has"
                    " double quotes, which the shell removes unless you put single quotes around"
                    " them: '\"like this\"'."
                ) from e
        try:
            send_event(channel, event_type, data, options["skip"], json_encode=False, using=alias)
        except Error as e:
            raise CommandError(f"Database {alias!r}: {e}") from e
        self.stdout.write("1 event sent.")

    def _send_lines(self, alias: str, options: dict[str, Any]) -> None:
        if options["type"] is not None or options["skip"]:
            raise CommandError(
                "With - everything about the events comes from the lines: leave out TYPE, DATA and"
                ' --skip, and use "skip_user_ids".'
            )
        if options["batch"] is not None and options["batch"] < 1:
            raise CommandError("--batch must be at least 1.")
        progress = Progress(self.stderr) if self.stderr.isatty() else None
        size = _size(sys.stdin.fileno()) if progress else None

        def show(events: int, read: int) -> None:
            if progress is not None:
                progress.show(f"{events:,} events", read / size if size else None)

        sender = Sender(
            alias,
            batch=options["batch"],
            raw=options["text"],
            progress=show,
        )
        try:
            sent = sender.send(sys.stdin.buffer)
        except Error as e:
            raise CommandError(f"Database {alias!r}: {e}\n{sender.so_far()}") from e
        finally:
            if progress is not None:
                progress.end()
        self.stdout.write(f"{sent} event{'' if sent == 1 else 's'} sent.")


def _size(file: int) -> int | None:
    """The number of bytes that are left to read; None for a pipe or a terminal."""
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_size - os.lseek(file, 0, os.SEEK_CUR)
