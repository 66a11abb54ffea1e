from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from mmap import mmap
from typing import Any

from django import db
from django.core.management.base import CommandError

from ...consumers import operations
from ...consumers.declare import Consumer, discover
from ...consumers.progress import read_consumers
from ...consumers.supervisor import Supervisor, stopping_on
from ...consumers.targets import FORMS, parse_target
from ...consumers.trouble import find_consumer, list_parked
from ...consumers.worker import Progress as RunProgress
from ...consumers.worker import Worker
from ...operate.consumer_screen import render_consumers, render_parked
from ...postgres.connector import Connector, plain_sql
from ..base import DatabaseCommand, log_to_stderr
from ..metrics_port import (
    add_metrics_arguments,
    counting_in_all_processes,
    require_prometheus_client,
    serving_metrics,
)
from ..progress import Progress

_MOST_PROCESSES = 64


class Command(DatabaseCommand):
    help = "Runs durable consumers, and shows and changes how far they are."

    def add_arguments(self, parser: ArgumentParser) -> None:
        commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")

        def add(name: str, text: str, *positional: str) -> ArgumentParser:
            added: ArgumentParser = commands.add_parser(name, help=text, description=text)
            for one in positional:
                added.add_argument(one.lower(), metavar=one)
            self.add_database_argument(added)
            return added

        listing = add("list", "show all consumers, and what is wrong with them")
        run = add("run", "handle events until stopped")
        reset = add("reset", "continue at another place, and handle events again", "NAME")
        parked = add("parked", "show the events that could not be handled", "NAME")
        retry = add("retry", "try parked events again", "NAME")
        add("skip", "give up an event that is parked, or at which it fails", "NAME", "ID")
        add("pause", "handle no more events until resumed", "NAME")
        add("resume", "continue after a pause, or after it stopped at an event", "NAME")
        add("rename", "give a consumer another name, and keep how far it is", "OLD", "NEW")
        remove = add("remove", "delete all that is stored about a consumer", "NAME")

        run.add_argument("names", nargs="*", metavar="NAME", help="default: all consumers")
        run.add_argument(
            "--processes",
            type=_processes,
            default=1,
            metavar="N",
            help="share the work among N processes",
        )
        run.add_argument(
            "--once", action="store_true", help="handle what is committed by now, and end"
        )
        run.add_argument(
            "--dsn",
            help="libpq connection string for the locks, where the alias leads through a pooler",
        )
        add_metrics_arguments(run)
        reset.add_argument(
            "--to",
            required=True,
            metavar="PLACE",
            help=f"the place after which it continues: {FORMS}",
        )
        retry.add_argument("ids", nargs="*", metavar="ID", help="as `parked` shows them")
        retry.add_argument("--all", action="store_true", help="all parked events")
        for shown in (listing, parked):
            shown.add_argument("--json", action="store_true", help="print JSON, for programs")
        parked.add_argument("--tracebacks", action="store_true", help="where each error was raised")
        remove.add_argument(
            "--yes", action="store_true", help="do not ask, even if it still seems to be needed"
        )

    def run(self, alias: str, options: dict[str, Any]) -> None:
        try:
            getattr(self, f"_{options['subcommand']}")(alias, options)
        except db.Error as e:
            raise CommandError(f"Database {alias!r}: {e}") from e

    # Run

    def _run(self, alias: str, options: dict[str, Any]) -> None:
        log_to_stderr(options["verbosity"])
        consumers = _choose(options["names"])
        connector = Connector(alias, options["dsn"], self.limits)

        # Shared by this process and those that it starts.
        known = mmap(-1, len(consumers))

        def make_worker() -> Worker:
            return Worker(consumers, alias, connector, known)

        if options["once"]:
            if options["processes"] > 1:
                raise CommandError("--once runs in one process. Leave out --processes.")
            self._run_once(make_worker())
        elif options["metrics_port"] is None:
            self._supervise(Supervisor(make_worker, options["processes"], self.limits))
        else:
            require_prometheus_client()
            serve = partial(_serve, consumers, connector, options)
            with counting_in_all_processes():
                self._supervise(Supervisor(make_worker, options["processes"], self.limits, serve))

    def _supervise(self, supervisor: Supervisor) -> None:
        if not supervisor.run():
            raise CommandError("The consumers cannot run; the reason is in the log.")

    def _run_once(self, worker: Worker) -> None:
        progress = Progress(self.stderr) if self.stderr.isatty() else None
        began = time.monotonic()

        def show(found: RunProgress) -> None:
            if progress is not None:
                rate = found.handled / max(time.monotonic() - began, 0.001)
                text = f"{found.handled:,} events, {rate:,.0f}/s, {found.left:,} left"
                progress.show(text, found.share)

        with stopping_on((signal.SIGINT, signal.SIGTERM), worker.stop, once=True):
            try:
                handled = worker.run_once(show)
            finally:
                if progress is not None:
                    progress.end()
        events = _count(handled, "event")
        if worker.is_stopped:
            raise CommandError(f"Interrupted. {events} handled; the next run continues there.")
        self.stdout.write(f"{events} handled.")

    # Look

    def _list(self, alias: str, options: dict[str, Any]) -> None:
        with self.connect(alias, "consumers list") as connection:
            found = read_consumers(connection, discover())
        if found is None:
            raise CommandError(
                "The tables of the consumers are missing, or this role may not read them. Apply the"
                f" migrations, or grant the rights of an observer ({plain_sql()}/grants.sql)."
            )
        if options["json"]:
            self._write_json([dataclasses.asdict(one) for one in found])
        else:
            self._write(render_consumers(found, self._paint))

    def _parked(self, alias: str, options: dict[str, Any]) -> None:
        name = options["name"]
        with self.connect(alias, "consumers list") as connection:
            is_whole = options["json"] or options["tracebacks"]
            found = list_parked(
                connection,
                find_consumer(connection, name),
                content="all" if is_whole else "error",
            )
        if options["json"]:
            self._write_json([dataclasses.asdict(one) for one in found])
        else:
            self._write(
                render_parked(name, found, tracebacks=options["tracebacks"], paint=self._paint)
            )

    def _write(self, text: str) -> None:
        encoding = getattr(self.stdout, "encoding", None) or "utf-8"
        self.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _write_json(self, value: object) -> None:
        self.stdout.write(json.dumps(value, indent=2, default=_as_text))

    def _paint(self, kind: str, text: str) -> str:
        styles = {
            "broken": self.style.ERROR,
            "degraded": self.style.WARNING,
            "healthy": self.style.SUCCESS,
            "label": self.style.MIGRATE_LABEL,
        }
        return str(styles[kind](text))

    # Change

    def _pause(self, alias: str, options: dict[str, Any]) -> None:
        name = options["name"]
        if operations.pause(alias, name, self.limits):
            self.stdout.write(f"The consumer {name!r} is paused.")
        else:
            self.stdout.write(f"The consumer {name!r} was paused already.")

    def _resume(self, alias: str, options: dict[str, Any]) -> None:
        name = options["name"]
        resumed = operations.resume(alias, name, self.limits)
        texts = []
        if resumed.was_paused:
            texts.append(f"The consumer {name!r} is not paused any more.")
        if resumed.stopped:
            texts.append(f"{_count(resumed.stopped, 'slot')} that had stopped will try again.")
        self.stdout.write(
            " ".join(texts) or f"The consumer {name!r} was neither paused nor stopped."
        )

    def _reset(self, alias: str, options: dict[str, Any]) -> None:
        name = options["name"]
        target = parse_target(options["to"])
        result = operations.reset(alias, name, target, self.limits)
        text = f"The consumer {name!r} continues after position {result.position:,}."
        if result.replay_to is not None:
            text += (
                f" Events up to position {result.replay_to:,} that it has handled are handled"
                " again."
            )
        if result.unparked:
            text += f" {_count(result.unparked, 'parked event')} among them."
        if result.replay_to is not None and not result.prepared:
            text += " Its code has no function for before_reset, so what it has made of them stays."
        self.stdout.write(text)

    def _retry(self, alias: str, options: dict[str, Any]) -> None:
        name, ids = options["name"], options["ids"]
        if bool(ids) == options["all"]:
            raise CommandError("Name the events to try again, or use --all for all of them.")
        count = operations.retry(alias, name, None if options["all"] else ids, self.limits)
        text = f"{_count(count, 'event')} will be tried again"
        if count and not operations.usage(alias, name, self.limits).held_slots:
            text += " as soon as a process runs the consumer"
        self.stdout.write(f"{text}.")

    def _skip(self, alias: str, options: dict[str, Any]) -> None:
        skipped = operations.skip(alias, options["name"], options["id"], self.limits)
        kind = "parked event" if skipped.was_parked else "event"
        self.stdout.write(f"The {kind} {skipped.id} is skipped.")

    def _rename(self, alias: str, options: dict[str, Any]) -> None:
        old, new = options["old"], options["new"]
        operations.rename(alias, old, new, self.limits)
        text = f"The consumer {old!r} is {new!r} now."
        if new not in discover():
            text += " Code that has the old name does not run it any more: deploy the new code."
        self.stdout.write(text)

    def _remove(self, alias: str, options: dict[str, Any]) -> None:
        name = options["name"]
        usage = operations.usage(alias, name, self.limits)
        reasons = []
        if usage.declared_at is not None:
            reasons.append(f"the code still declares it ({usage.declared_at})")
        if usage.held_slots:
            reasons.append(f"processes run it now ({_count(usage.held_slots, 'slot')})")
        if reasons and not options["yes"]:
            question = f"The consumer {name!r} seems to be needed: {' and '.join(reasons)}."
            if not (self.stdout.isatty() and sys.stdin and sys.stdin.isatty()):
                raise CommandError(f"{question} To remove it in spite of that, use --yes.")
            if not self._confirm(f"{question} Remove it?"):
                raise CommandError("Nothing was removed.")
        operations.remove(alias, name, self.limits)
        self.stdout.write(f"The consumer {name!r} is removed.")

    def _confirm(self, question: str) -> bool:
        """Ask a person. Ctrl-C and Ctrl-D mean no."""
        try:
            return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            self.stdout.write("")  # the message begins on a line of its own
            return False


def _serve(
    consumers: list[Consumer], connector: Connector, options: dict[str, Any]
) -> AbstractContextManager[None]:
    from ...operate.prometheus.health import ConsumersHealth

    names = {consumer.name for consumer in consumers}
    return serving_metrics(
        options["metrics_host"],
        options["metrics_port"],
        connector,
        lambda state: ConsumersHealth(names, state),
    )


def _choose(names: list[str]) -> list[Consumer]:
    consumers = discover()
    if unknown := [name for name in names if name not in consumers]:
        raise CommandError(
            f"There is no consumer {', '.join(map(repr, unknown))} in the code. There are:"
            f" {', '.join(consumers) or 'none'}."
        )
    chosen = [consumers[name] for name in names] if names else [*consumers.values()]
    if not chosen:
        raise CommandError(
            "No consumer is declared. Declare one with @consumer in the module event_consumers of"
            " an installed app."
        )
    return chosen


def _processes(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_PROCESSES:
        raise ArgumentTypeError(
            f"it must be a whole number from 1 to {_MOST_PROCESSES}, not {text!r}"
        )
    return int(text)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _as_text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
