"""Events that the trigger did not see: the check reports them, and they alone are pruned."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from django.core.checks import run_checks
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connections, transaction
from django.test import override_settings

from pg_eventstream import send_event, send_events
from pg_eventstream.checks.tables import SEND_AGAIN
from pg_eventstream.publisher.pruner import Pruner
from tests.support.database import Database

EVENT = "pg_eventstream_event"
DISABLE = f"ALTER TABLE {EVENT} DISABLE TRIGGER ALL"
TRIGGER = "pgtrigger_enqueue_3f3f6"
ANOTHER = f"""
    CREATE CONSTRAINT TRIGGER another AFTER INSERT ON {EVENT} DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW {{}} EXECUTE FUNCTION pg_eventstream_enqueue()
"""


def found(database: Database) -> list[str]:
    """The ids of the messages."""
    connections.close_all()
    return [str(m.id).removeprefix("pg_eventstream.") for m in run_checks(databases=["default"])]


def check(**options: object) -> str:
    connections.close_all()
    output = io.StringIO()
    call_command("check", databases=["default"], stdout=output, stderr=output, **options)
    return output.getvalue()


def insert_unseen(database: Database, count: int = 1, age: str = "0 s") -> None:
    with database.connect() as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            "INSERT INTO pg_eventstream_event (channel, data, created)"
            " SELECT 'unseen', n::text, now() - %s::interval FROM generate_series(1, %s) AS n",
            [age, count],
        )


def data(database: Database) -> list[str]:
    return [row[0] for row in database.fetch("SELECT data FROM pg_eventstream_event ORDER BY id")]


def test_nothing_is_found_where_nothing_is_wrong(database: Database) -> None:
    send_event("a", "message", 1)
    database.execute("SELECT pg_eventstream_sequence()")
    send_event("a", "message", 2)
    assert found(database) == []


@pytest.mark.parametrize(
    ("fault", "ids", "says"),
    [
        (DISABLE, ["E021"], f'ENABLE TRIGGER "{TRIGGER}";'),
        (f"ALTER TABLE {EVENT} DISABLE TRIGGER USER", ["E021"], "disabled"),
        (f"ALTER TABLE {EVENT} ENABLE REPLICA TRIGGER {TRIGGER}", ["E021"], "for replicas only"),
        (f"ALTER TABLE {EVENT} ENABLE ALWAYS TRIGGER {TRIGGER}", [], ""),
        (f"DROP TRIGGER {TRIGGER} ON {EVENT}", ["E021"], "has no trigger"),
        (f"DROP TRIGGER {TRIGGER} ON {EVENT};" + ANOTHER.format(""), [], ""),
        (
            f"DROP TRIGGER {TRIGGER} ON {EVENT};" + ANOTHER.format("WHEN (NEW.id > 1)"),
            ["E021"],
            "condition",
        ),
        (
            f"DROP TRIGGER {TRIGGER} ON {EVENT};"
            f" CREATE TRIGGER another AFTER INSERT ON {EVENT} FOR EACH ROW"
            " EXECUTE FUNCTION pg_eventstream_enqueue()",
            ["E021"],
            "DEFERRABLE INITIALLY DEFERRED",
        ),
        (ANOTHER.format(""), ["E021", "E021"], "2 triggers"),
        (f"CREATE TABLE heir () INHERITS ({EVENT})", ["E021"], "table heir"),
        ("DROP FUNCTION pg_eventstream_enqueue() CASCADE", ["E020"], "pg_eventstream_enqueue()"),
        ("DROP FUNCTION pg_eventstream_sequence()", ["E020"], "pg_eventstream_sequence()"),
        (
            "ALTER ROLE postgres IN DATABASE {} SET session_replication_role = replica",
            ["W020", "W020"],
            "role postgres",
        ),
        (
            "ALTER DATABASE {} SET session_replication_role = replica",
            ["W020", "W020"],
            "for all roles",
        ),
        ("DROP TABLE pg_eventstream_proxy", ["I001"], "pg_eventstream_proxy"),
        ("DROP TABLE pg_eventstream_event CASCADE", ["I001"], "migrate"),
        ("DELETE FROM django_migrations WHERE app = 'pg_eventstream'", [], ""),  # made by psql
    ],
)
def test_what_hides_events_from_the_trigger_is_found(
    database: Database, fault: str, ids: list[str], says: str
) -> None:
    connections.close_all()
    database.execute(fault.replace("{}", database.name))
    assert found(database) == ids
    try:
        output = check()
    except SystemCheckError as e:
        assert any(name.startswith("E") for name in ids)
        output = str(e)
    else:
        assert not any(name.startswith("E") for name in ids)
    assert says in output


def test_trigger_is_put_back_by_what_the_check_says(database: Database) -> None:
    database.execute(f"DROP TRIGGER {TRIGGER} ON {EVENT}")
    call_command("pgtrigger", "install", "pg_eventstream.Event:enqueue")
    assert found(database) == []


def test_database_that_is_not_migrated_yet_can_be_migrated(database: Database) -> None:
    call_command("migrate", "pg_eventstream", "zero", verbosity=0)
    assert found(database) == ["I001"]
    call_command("migrate", "pg_eventstream", verbosity=0)
    assert found(database) == []


def test_only_the_databases_that_hold_the_tables_are_checked(database: Database) -> None:
    database.execute("DROP TABLE pg_eventstream_event CASCADE")
    assert run_checks() == []
    with override_settings(DATABASE_ROUTERS=[f"{__name__}.NotHere"]):
        assert found(database) == ["E019"]  # which needs no look at the tables


class NotHere:
    def allow_migrate(self, db: str, app_label: str, **hints: object) -> bool | None:
        return False if app_label == "pg_eventstream" else None


@pytest.mark.parametrize(("count", "says"), [(3, "3 events"), (1500, "At least 1000 events")])
def test_events_without_a_place_are_found_and_can_be_sent(
    database: Database, count: int, says: str
) -> None:
    send_event("seen", "message", "sequenced")
    database.execute("SELECT pg_eventstream_sequence()")
    send_event("seen", "message", "committed")
    insert_unseen(database, count)
    assert found(database) == ["W021"]
    output = check()
    assert says in output
    assert SEND_AGAIN in output
    database.execute(SEND_AGAIN)
    assert found(database) == []
    assert database.value("SELECT pg_eventstream_sequence()") == count + 1
    assert database.fetch(
        "SELECT data FROM pg_eventstream_stream JOIN pg_eventstream_event AS e ON e.id = event_id"
        " WHERE e.channel = 'unseen' ORDER BY eid"
    ) == [(str(n),) for n in range(1, count + 1)]


def test_event_that_is_being_sent_is_not_taken_for_unseen(database: Database) -> None:
    """In a TestCase no transaction commits, and checks can run in it."""
    with transaction.atomic():
        send_event("a", "message", 1)
        assert run_checks(databases=["default"]) == []
    assert found(database) == []


def test_role_that_may_only_send_can_check(database: Database) -> None:
    database.execute("DROP ROLE IF EXISTS role_check; CREATE ROLE role_check LOGIN")
    insert_unseen(database)
    settings = connections["default"].settings_dict
    settings["USER"] = "role_check"
    try:
        assert found(database) == []
    finally:
        settings["USER"] = "postgres"
        connections.close_all()


# Pruning


@pytest.fixture
def sweep(database: Database) -> Iterator[Pruner]:
    with database.connect() as connection, override_settings(GRIP_URL=None):
        yield Pruner(connection)


def test_unseen_events_are_pruned_when_they_are_old(database: Database, sweep: Pruner) -> None:
    insert_unseen(database, 3, "24 hours 1 second")
    insert_unseen(database, 2, "23 hours")
    assert sweep.run_once() == 3
    assert data(database) == ["1", "2"]
    with override_settings(EVENTSTREAM_RETENTION=timedelta(hours=22)):
        assert sweep.run_once() == 2
    assert data(database) == []


def test_pruning_unseen_events_says_so(
    database: Database, sweep: Pruner, caplog: pytest.LogCaptureFixture
) -> None:
    insert_unseen(database, 3, "2 days")
    sweep.run_once()
    (record,) = caplog.records
    assert "3 events" in record.getMessage()
    assert "check --database default" in record.getMessage()


def committed(database: Database) -> None:
    pass


def sequenced(database: Database) -> None:
    database.execute("SELECT pg_eventstream_sequence()")


def sequenced_for_a_proxy_that_is_away(database: Database) -> None:
    database.execute("SELECT pg_eventstream_sequence()")
    database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '9 days'")
    database.execute("INSERT INTO pg_eventstream_proxy (name, position) VALUES ('p', 0)")


def imported(database: Database) -> None:
    database.execute("SELECT pg_eventstream_sequence()")
    database.execute("UPDATE pg_eventstream_stream SET position = position - 1000000")


def at_the_upper_end_of_many(database: Database) -> None:
    with override_settings(EVENTSTREAM_RETENTION=timedelta(days=365)):
        send_events([("many", "message", n) for n in range(11_000)])
        database.execute("UPDATE pg_eventstream_outbox SET seq = DEFAULT WHERE channel = 'old'")
        database.execute("SELECT pg_eventstream_sequence()")


@pytest.mark.parametrize(
    "place",
    [
        committed,
        sequenced,
        sequenced_for_a_proxy_that_is_away,
        imported,
        at_the_upper_end_of_many,
    ],
)
def test_event_with_a_place_stays_however_old_it_is(
    database: Database, sweep: Pruner, place: Callable[[Database], None]
) -> None:
    """By its own time, which is the beginning of its transaction or was set by the sender."""
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, data, created)"
        " SELECT 'old', 'old ' || n, now() - interval '9 days' FROM generate_series(1, 3) AS n"
    )
    insert_unseen(database, 2, "9 days")
    place(database)
    with override_settings(
        GRIP_URL="http://localhost:1" if place is sequenced_for_a_proxy_that_is_away else None
    ):
        assert sweep.run_once() == 2
        assert data(database)[:3] == ["old 1", "old 2", "old 3"]
        sweep._forget()
        assert sweep.run_once() == 0


@pytest.mark.parametrize("prepared", [False, True])
def test_event_of_a_transaction_that_is_open_stays(
    database: Database, sweep: Pruner, prepared: bool
) -> None:
    with database.connect(autocommit=False) as late:
        late.execute("SET LOCAL pg_eventstream.bell = off")
        late.execute(
            "INSERT INTO pg_eventstream_event (channel, data, created)"
            " VALUES ('a', 'late', now() - interval '9 days')"
        )
        insert_unseen(database, 1, "9 days")
        if prepared:
            late.execute("PREPARE TRANSACTION 'unseen'")
        assert sweep.run_once() == 1
        late.commit()
        if prepared:
            database.execute("COMMIT PREPARED 'unseen'")
    sweep._forget()
    assert sweep.run_once() == 0
    database.execute("SELECT pg_eventstream_sequence()")
    assert sweep.run_once() == 0
    assert data(database) == ["late"]


def test_young_events_in_front_hold_up_no_older_one(database: Database, sweep: Pruner) -> None:
    insert_unseen(database, 50, "-9 years")  # a clock was wrong
    insert_unseen(database, 1500, "2 days")
    insert_unseen(database, 2, "1 hour")
    assert sweep.run_once() == 1500
    assert len(data(database)) == 52


def test_events_that_stay_are_looked_for_once(database: Database, sweep: Pruner) -> None:
    """Events that no proxy has acknowledged for days are not looked up in each run."""
    if sweep._connection.info.server_version < 150000:
        pytest.skip("PostgreSQL 14 has no pg_stat_force_next_flush()")
    send_events([("a", "message", n) for n in range(15_000)])
    sequenced_for_a_proxy_that_is_away(database)
    database.execute("UPDATE pg_eventstream_event SET created = now() - interval '9 days'")

    database.execute("ANALYZE")

    def rows_read() -> int:
        with database.connect() as connection:
            sweep._connection.execute("SELECT pg_stat_force_next_flush()")
            sweep._connection.execute("SELECT 1")
            connection.execute("SELECT pg_stat_clear_snapshot()")
            row = connection.execute(
                "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables"
                " WHERE relname = 'pg_eventstream_stream'"
            ).fetchone()
        assert row is not None
        return int(row[0])

    with override_settings(GRIP_URL="http://localhost:1"):
        before = rows_read()
        assert sweep.run_once() == 0
        first = rows_read() - before
        assert first >= 15_000
        assert sweep.run_once() == 0
        assert rows_read() - before - first < 1000


def test_event_that_is_sent_again_in_the_meantime_is_not_lost(database: Database) -> None:
    insert_unseen(database, 5, "2 days")
    with (
        database.connect(autocommit=False) as admin,
        database.connect() as connection,
        override_settings(GRIP_URL=None),
    ):
        admin.execute(SEND_AGAIN)
        pruned: list[int] = []
        thread = threading.Thread(target=lambda: pruned.append(Pruner(connection).run_once()))
        thread.start()
        while not database.fetch("SELECT FROM pg_locks WHERE NOT granted AND pid = %s", [
            connection.info.backend_pid
        ]):  # fmt: skip
            assert thread.is_alive()
        admin.commit()
        thread.join(20)
        assert pruned == [0]
    assert database.value("SELECT pg_eventstream_sequence()") == 5
