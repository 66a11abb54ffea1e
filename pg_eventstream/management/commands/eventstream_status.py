from __future__ import annotations

import dataclasses
import json
import sys
import time
from argparse import ArgumentParser
from datetime import datetime
from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError
from django.db import DatabaseError

from pg_eventstream.errors import EventStreamError
from pg_eventstream.management.base import DatabaseCommand, find_alias
from pg_eventstream.operate.findings import COULD_NOT_LOOK, EXIT_CODES, Finding, judge, verdict
from pg_eventstream.operate.screen import render
from pg_eventstream.operate.state import State, read_state
from pg_eventstream.postgres.connector import explain

# Home; the rest of a line; the rest of the screen; all of it.
_HOME, _TO_END_OF_LINE, _BELOW, _CLEAR = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[2J"


class Command(DatabaseCommand):
    help = (
        "Shows whether events reach their readers: what is wrong first, with what to do. Exit"
        " status: 0 healthy, 1 degraded, 2 broken, 3 if the database could not be read."
    )
    # It must run where the checks find errors. It reports those of the tables itself.
    requires_system_checks = []  # noqa: RUF012

    def add_arguments(self, parser: ArgumentParser) -> None:
        self.add_database_argument(parser)
        parser.add_argument("--json", action="store_true", help="print JSON, for programs")
        parser.add_argument(
            "--watch",
            nargs="?",
            type=_seconds,
            const=2.0,
            metavar="SECONDS",
            help="show it again every SECONDS (default 2), until Ctrl-C",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if options["watch"]:
            self._watch(options)
            return
        try:
            state, findings = self._look(options)
        except CommandError as e:
            if not options["json"]:
                raise
            self.stdout.write(json.dumps({"verdict": "unknown", "error": str(e)}, indent=2))
            sys.exit(COULD_NOT_LOOK)
        self.stdout.write(self._show(state, findings, options))
        sys.exit(EXIT_CODES[verdict(findings)])

    def _look(self, options: dict[str, Any]) -> tuple[State, list[Finding]]:
        """Raises `CommandError`, with the exit status 3, if the database cannot be read."""
        try:
            alias = find_alias(options["database"])
            state = read_state(alias, ask_proxies=True, limits=self.limits)
            return state, judge(state)
        except CommandError as e:
            raise CommandError(str(e), returncode=COULD_NOT_LOOK) from e
        except (EventStreamError, ImproperlyConfigured, DatabaseError) as e:
            raise CommandError(str(e), returncode=COULD_NOT_LOOK) from e
        except psycopg.Error as e:
            raise CommandError(f"Database: {explain(e)}", returncode=COULD_NOT_LOOK) from e

    def _show(self, state: State, findings: list[Finding], options: dict[str, Any]) -> str:
        if options["json"]:
            found = {
                "verdict": verdict(findings),
                "findings": [dataclasses.asdict(finding) for finding in findings],
                "state": dataclasses.asdict(state),
            }
            # One line for each time, so that a program can read them one by one.
            return json.dumps(found, default=_as_text, indent=None if options["watch"] else 2)
        return render(state, findings, self._paint)

    def _watch(self, options: dict[str, Any]) -> None:
        redraws = self.stdout.isatty() and not options["json"]
        if redraws:
            self.stdout.write(_CLEAR, ending="")
        try:
            while True:
                try:
                    text = self._show(*self._look(options), options)
                except CommandError as e:
                    error = {"verdict": "unknown", "error": str(e)}
                    text = json.dumps(error) if options["json"] else self.style.ERROR(str(e))
                if redraws:
                    lines = text.replace("\n", f"{_TO_END_OF_LINE}\n")
                    text = f"{_HOME}{lines}{_TO_END_OF_LINE}\n{_BELOW}"
                self.stdout.write(text, ending="" if redraws else "\n")
                self.stdout.flush()
                time.sleep(options["watch"])
        except (KeyboardInterrupt, BrokenPipeError):
            sys.exit(0)

    def _paint(self, kind: str, text: str) -> str:
        styles = {
            "broken": self.style.ERROR,
            "degraded": self.style.WARNING,
            "healthy": self.style.SUCCESS,
            "label": self.style.MIGRATE_LABEL,
        }
        return styles[kind](text)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 86_400:
        raise ValueError(text)
    return seconds


def _as_text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
