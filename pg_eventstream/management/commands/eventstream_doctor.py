from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import psycopg
from django.core.management.base import CommandError
from django.db import DatabaseError

from pg_eventstream import views
from pg_eventstream.management.base import DatabaseCommand
from pg_eventstream.operate.doctor.address import check_url, find_url
from pg_eventstream.operate.doctor.diagnosis import diagnose
from pg_eventstream.operate.doctor.measured import Measured
from pg_eventstream.operate.doctor.probes import Prober
from pg_eventstream.operate.findings import COULD_NOT_LOOK, EXIT_CODES, Finding, judge, verdict
from pg_eventstream.operate.screen import render_findings
from pg_eventstream.operate.state import read_state
from pg_eventstream.postgres.connector import explain
from pg_eventstream.postgres.report import DOCTOR, write_report


class Command(DatabaseCommand):
    help = (
        "Sends probes along the way of an event, from the database to a client, and says what is"
        " wrong and what to change. Exit status: 0 healthy, 1 degraded, 2 broken, 3 if it could"
        " not look."
    )
    # It must run where the checks find errors. It reports those of the tables itself.
    requires_system_checks = []  # noqa: RUF012

    def add_arguments(self, parser: ArgumentParser) -> None:
        self.add_database_argument(parser)
        parser.add_argument(
            "--through",
            metavar="URL",
            help="the URL at which clients open streams, such as https://example.com/events/;"
            " default: the proxy, or else runserver, on its usual port",
        )
        parser.add_argument(
            "--header",
            action="append",
            default=[],
            type=_header,
            metavar="HEADER",
            help="send this header as well, for example 'Cookie: sessionid=…' where a login is"
            " required; may be repeated",
        )
        parser.add_argument(
            "--timeout",
            type=_seconds,
            default=10.0,
            metavar="SECONDS",
            help="how long to wait for each step (default 10)",
        )
        parser.add_argument("--json", action="store_true", help="print JSON, for programs")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            super().handle(*args, **options)
        except KeyboardInterrupt:
            sys.exit(COULD_NOT_LOOK)
        except (CommandError, DatabaseError) as e:
            cause = e.__cause__
            is_database = isinstance(e, DatabaseError) and isinstance(cause, psycopg.Error)
            text = f"Database: {explain(cause)}" if is_database else str(e)  # type: ignore[arg-type]
            if not options["json"]:
                raise CommandError(text, returncode=COULD_NOT_LOOK) from e
            self.stdout.write(json.dumps({"verdict": "unknown", "error": text}, indent=2))
            sys.exit(COULD_NOT_LOOK)

    def run(self, alias: str, options: dict[str, Any]) -> None:
        url, origin = options["through"], ""
        if url is None:
            url, origin = find_url(views.events)
        check_url(url)

        def say(line: str) -> None:
            if not options["json"]:
                self.stdout.write(line)
                self.stdout.flush()

        say(f"Through {url}{origin}")
        say("")
        measured = Prober(
            url, alias, headers=dict(options["header"]), timeout=options["timeout"], say=say
        ).run()
        state = read_state(alias, ask_proxies=measured.is_unpublished, limits=self.limits)
        findings = diagnose(measured, judge(state), state.report)
        self._report(alias, measured, findings)
        if options["json"]:
            self.stdout.write(json.dumps(_result(measured, findings), indent=2))
        else:
            self._show(findings)
        if findings:
            sys.exit(EXIT_CODES[verdict(findings)])

    def _show(self, findings: list[Finding]) -> None:
        self.stdout.write("")
        if not findings:
            text = "HEALTHY: events arrive in order, and streams continue and resume."
            self.stdout.write(self.style.SUCCESS(text))
        styles = {"broken": self.style.ERROR, "degraded": self.style.WARNING}
        for line in render_findings(findings, lambda kind, text: styles[kind](text)):
            self.stdout.write(line)

    def _report(self, alias: str, measured: Measured, findings: list[Finding]) -> None:
        """Leave the result for the status command and for monitoring."""
        content = {
            "ok": not findings,
            "findings": [finding.code for finding in findings],
            "seconds": asdict(measured.probe) if measured.probe else {},
        }
        # A standby and a role that may not write have been found already.
        with suppress(psycopg.Error), self.connect(alias, "doctor") as connection:
            write_report(connection, DOCTOR, content)


def _result(measured: Measured, findings: list[Finding]) -> dict[str, Any]:
    return {
        "verdict": verdict(findings),
        "findings": [asdict(finding) for finding in findings],
        "url": measured.url,
        "proxied": measured.is_proxied if measured.description else None,
        "opened": measured.opened,
        "continued": measured.continued,
        "seconds": asdict(measured.probe) if measured.probe else None,
        "steady": asdict(measured.steady) if measured.steady else None,
        "resumed": None if measured.resumed is None else measured.has_resumed,
        "clocks": measured.clocks,
    }


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or any(c in text for c in "\r\n"):
        raise ArgumentTypeError(f"{text!r} is not a header, such as 'Cookie: sessionid=…'")
    return name.strip(), value.strip()


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= 3600:
            return float(text)
    raise ArgumentTypeError(f"{text!r} is not a number of seconds, at most 3600")
