"""Breaks an installation for real, in the ways that people do, and repairs what outlives the test.

Each breakage yields the environment in which the status command then runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from django.core.management import call_command
from django.db import connections

from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import free_port, wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.control_port import ControlPort
from tests.support.copied import copied
from tests.support.database import TEMPLATE, Database
from tests.support.environment import DIRECTORY, publishes_to
from tests.support.faults import OURS, SEQUENCING, locked, suspended
from tests.support.pgbouncer import pgbouncer
from tests.support.publisher import NewPublisher, PublisherProcess
from tests.support.roles import as_role, granted, make_old

Environment = dict[str, str]
NO_PROXY: Environment = {"PG_EVENTSTREAM_TEST_GRIP_URL": ""}
HEARTBEAT = "UPDATE pg_eventstream_publisher SET heartbeat = now() - interval '1 minute'"
COMMITTED = "UPDATE pg_eventstream_outbox SET committed_at = now() - interval '1 minute'"
MANY = (
    "INSERT INTO pg_eventstream_event (channel, data) SELECT 'c', '' FROM generate_series(1, 10000)"
)


@dataclass
class Installation:
    """A database, a proxy that is only a control port, and what can be started."""

    database: Database
    control: ControlPort
    new_publisher: NewPublisher
    second_pushpin: Pushpin

    @property
    def environment(self) -> Environment:
        """The application's."""
        return publishes_to(self.control.url)

    def publisher(self, *arguments: str, **environment: str) -> PublisherProcess:
        return self.new_publisher(*arguments, **{**self.environment, **environment})

    def lead(self, *arguments: str, **environment: str) -> PublisherProcess:
        """Start a publisher, and wait until it has said what it knows of itself."""
        publisher = self.publisher(*arguments, **environment).lead()
        reports = "SELECT count(*) FROM pg_eventstream_report WHERE name = 'publisher'"
        if environment.get("PG_EVENTSTREAM_TEST_DSN", self.database.dsn).endswith(
            self.database.name
        ):
            wait_until(lambda: self.database.value(reports) == 1, timeout=20)
        return publisher


def settings(**values: Any) -> Environment:
    return {"PG_EVENTSTREAM_TEST_SETTINGS": json.dumps(values)}


# The publisher


@contextmanager
def no_publisher(it: Installation) -> Iterator[Environment]:
    yield it.environment


@contextmanager
def publisher_killed(it: Installation) -> Iterator[Environment]:
    it.lead().kill()
    yield it.environment


@contextmanager
def leader_suspended(it: Installation) -> Iterator[Environment]:
    leader = it.lead()
    it.publisher().start()  # which cannot take over
    with suspended(leader):
        # Its last statement can contain a heartbeat.
        working = f"SELECT count(*) {OURS} AND state = 'active'"
        wait_until(lambda: it.database.value(working) == 0, timeout=30)
        it.database.execute(HEARTBEAT)  # a minute passes
        yield it.environment


@contextmanager
def publisher_on_another_database(it: Installation) -> Iterator[Environment]:
    other = f"{it.database.name}_other"
    server = Database(it.database.postgres, "postgres")
    server.execute(f"CREATE DATABASE {other} TEMPLATE {TEMPLATE}")
    try:
        publisher = it.lead(PG_EVENTSTREAM_TEST_DSN=it.database.postgres.dsn(other))
        yield it.environment
        publisher.kill()
    finally:
        server.execute(f"DROP DATABASE {other} WITH (FORCE)")


@contextmanager
def publisher_may_not_execute(it: Installation) -> Iterator[Environment]:
    role = granted(it.database, "publisher")
    it.database.execute(f"REVOKE EXECUTE ON FUNCTION pg_eventstream_sequence() FROM {role}")
    it.lead(PG_EVENTSTREAM_TEST_DSN=as_role(it.database, role))
    yield it.environment


@contextmanager
def publisher_behind_pgbouncer(it: Installation) -> Iterator[Environment]:
    with pgbouncer(it.database) as address:
        publisher = it.lead(f"--dsn={address}")
        yield it.environment
        publisher.kill()


@contextmanager
def lock_held_that_the_publisher_needs(it: Installation) -> Iterator[Environment]:
    it.lead()
    with locked(it.database, SEQUENCING):
        it.database.send("c")
        it.database.execute(COMMITTED)
        yield it.environment


@contextmanager
def publisher_of_another_version(it: Installation) -> Iterator[Environment]:
    it.lead()
    it.database.execute(
        'UPDATE pg_eventstream_report SET content = content || \'{"version": "0.0.9"}\''
    )
    yield it.environment


# The proxy


@contextmanager
def proxy_killed(it: Installation) -> Iterator[Environment]:
    it.second_pushpin.start()
    environment = publishes_to(it.second_pushpin.control_url)
    publisher = it.lead(**environment)
    it.second_pushpin.kill()
    it.database.send("c")
    publisher.wait_for_log("cannot be reached: ")
    yield environment


@contextmanager
def proxy_killed_while_nothing_is_sent(it: Installation) -> Iterator[Environment]:
    environment = publishes_to(f"http://127.0.0.1:{free_port()}")
    it.lead(**environment)
    yield environment


@contextmanager
def proxy_refuses_the_key(it: Installation) -> Iterator[Environment]:
    it.control.answers = [401] * 1000
    it.database.send("c")
    it.lead()
    yield it.environment


@contextmanager
def other_proxy_in_the_publisher(it: Installation) -> Iterator[Environment]:
    with ControlPort() as other:
        it.lead(**publishes_to(other.url))
        yield it.environment


@contextmanager
def no_proxy_in_the_application(it: Installation) -> Iterator[Environment]:
    it.lead()
    yield NO_PROXY


@contextmanager
def other_prefix_in_the_publisher(it: Installation) -> Iterator[Environment]:
    it.lead(**settings(GRIP_PREFIX="staging-"))
    yield it.environment


# The tables


@contextmanager
def trigger_disabled(it: Installation) -> Iterator[Environment]:
    it.database.execute("ALTER TABLE pg_eventstream_event DISABLE TRIGGER ALL")
    yield NO_PROXY


@contextmanager
def trigger_dropped(it: Installation) -> Iterator[Environment]:
    (name,) = it.database.fetch(
        "SELECT tgname FROM pg_trigger WHERE tgrelid = 'pg_eventstream_event'::regclass"
        " AND NOT tgisinternal"
    )[0]
    it.database.execute(f'DROP TRIGGER "{name}" ON pg_eventstream_event')
    yield NO_PROXY


@contextmanager
def functions_dropped(it: Installation) -> Iterator[Environment]:
    it.database.execute("DROP FUNCTION pg_eventstream_sequence()")
    yield NO_PROXY


@contextmanager
def migration_not_applied(it: Installation) -> Iterator[Environment]:
    call_command("migrate", "pg_eventstream", "0006", verbosity=0)
    yield NO_PROXY


@contextmanager
def tables_missing(it: Installation) -> Iterator[Environment]:
    it.database.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    connections.close_all()
    yield NO_PROXY


@contextmanager
def events_restored_without_the_trigger(it: Installation) -> Iterator[Environment]:
    with it.database.connect() as session:
        session.execute("SET session_replication_role = replica")
        session.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('c', '')")
    yield NO_PROXY


@contextmanager
def database_of_replicas(it: Installation) -> Iterator[Environment]:
    it.database.execute(f"ALTER DATABASE {it.database.name} SET session_replication_role = replica")
    yield NO_PROXY


@contextmanager
def role_without_rights(it: Installation) -> Iterator[Environment]:
    role = granted(it.database, "sender")
    yield {**it.environment, "PG_EVENTSTREAM_TEST_DSN": as_role(it.database, role)}


# The database


@contextmanager
def nothing_prunes(it: Installation) -> Iterator[Environment]:
    it.database.send("c")
    it.database.execute("SELECT pg_eventstream_sequence()")
    make_old(it.database)
    yield NO_PROXY


def _leave_dead_rows(database: Database) -> None:
    """Delete many events, while many transactions begin and end."""
    database.execute(MANY)
    database.execute("DELETE FROM pg_eventstream_event")
    database.execute(
        """
        CREATE UNLOGGED TABLE scratch (n int);
        DO $$ BEGIN
            FOR n IN 1..100000 LOOP
                BEGIN INSERT INTO scratch VALUES (n); EXCEPTION WHEN division_by_zero THEN END;
            END LOOP;
        END $$
        """
    )


@contextmanager
def transaction_left_open(it: Installation) -> Iterator[Environment]:
    with it.database.connect(autocommit=False, application_name="report") as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1")
        _leave_dead_rows(it.database)
        yield NO_PROXY


@contextmanager
def transaction_left_prepared(it: Installation) -> Iterator[Environment]:
    with it.database.connect(autocommit=False) as session:
        session.execute("INSERT INTO auth_group (name) VALUES ('a')")
        session.execute("PREPARE TRANSACTION 'half'")
    try:
        _leave_dead_rows(it.database)
        yield NO_PROXY
    finally:
        it.database.execute("ROLLBACK PREPARED 'half'")


@contextmanager
def _standby(it: Installation) -> Iterator[Postgres]:
    server = it.database.postgres
    standby = copied(
        server,
        DIRECTORY / f"{it.database.name}-standby",
        *("--write-recovery-conf", "--create-slot", "--slot=standby_one"),
        hot_standby_feedback="on",
        wal_receiver_status_interval="1",
    )
    try:
        yield standby
    finally:
        standby.stop("immediate")
        active = "SELECT active FROM pg_replication_slots WHERE slot_name = 'standby_one'"
        wait_until(lambda: not it.database.value(active), timeout=30)
        it.database.execute("SELECT pg_drop_replication_slot('standby_one')")


@contextmanager
def database_is_a_standby(it: Installation) -> Iterator[Environment]:
    with _standby(it) as standby:
        yield {**it.environment, "PG_EVENTSTREAM_TEST_DSN": standby.dsn(it.database.name)}


@contextmanager
def database_is_a_standby_behind_pgbouncer(it: Installation) -> Iterator[Environment]:
    with _standby(it) as standby, pgbouncer(Database(standby, it.database.name)) as address:
        yield {**it.environment, "PG_EVENTSTREAM_TEST_DSN": address}


@contextmanager
def standby_gone_and_its_slot_left(it: Installation) -> Iterator[Environment]:
    with _standby(it) as standby:
        fed_back = "SELECT xmin IS NOT NULL FROM pg_replication_slots"
        wait_until(lambda: bool(it.database.value(fed_back)), timeout=30)
        standby.stop("immediate")
        _leave_dead_rows(it.database)
        yield NO_PROXY


@contextmanager
def queue_filled(it: Installation) -> Iterator[Environment]:
    server = copied(
        it.database.postgres,
        DIRECTORY / f"{it.database.name}-queue",
        max_notify_queue_pages="64",
    )
    try:
        copy = Database(server, it.database.name)
        with copy.connect(autocommit=False) as listener:
            listener.execute("LISTEN something")
            listener.commit()
            listener.execute("SELECT 1")  # and stays in its transaction
            for _ in range(12):
                copy.execute("SELECT pg_notify('else', repeat('x', 7900))")
            yield {**NO_PROXY, "PG_EVENTSTREAM_TEST_DSN": copy.dsn}
    finally:
        server.stop("immediate")


# What cannot be looked at


@contextmanager
def database_down(it: Installation) -> Iterator[Environment]:
    yield {"PG_EVENTSTREAM_TEST_DSN": f"postgresql://postgres@127.0.0.1:{free_port()}/gone"}


@contextmanager
def database_of_another_name(it: Installation) -> Iterator[Environment]:
    yield {"PG_EVENTSTREAM_TEST_DSN": it.database.postgres.dsn("no_such_database")}


@contextmanager
def alias_unknown(it: Installation) -> Iterator[Environment]:
    yield settings(EVENTSTREAM_DATABASE="evnets")


@contextmanager
def database_not_postgresql(it: Installation) -> Iterator[Environment]:
    sqlite = {"ENGINE": "django.db.backends.sqlite3", "NAME": os.devnull}
    yield settings(DATABASES={"default": sqlite})
