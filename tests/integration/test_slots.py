"""The slot of a channel is the same in Python and in SQL, in a database of any encoding."""

from __future__ import annotations

import string
from collections.abc import Iterator

import pytest
from django.core.management import call_command

from pg_eventstream import send_events
from pg_eventstream.consumers import consumer, declare
from pg_eventstream.postgres.slots import follows, follows_sql, slot_of, slot_sql
from pg_eventstream.servers.postgres import Postgres
from tests.support.database import Database
from tests.support.dumped_data import as_default

LATIN = ["ü", "été", "ñ-1", "\xa0", "ÿ", "§±", "ß" * 120]
UNICODE = ["日本", "\U0001f300", "é", "e\u0301", "\u202e", "Ω", "\ufeff", "İ", "𝔘𝔫𝔦"]
ASCII = [
    *string.printable.replace("\r", "").replace("\n", ""),
    *(
        "orders",
        "a" * 255,
        "a b",
        " ",
        "a\\b",
        "\\x41",
        "'; --",
        '"',
        "%",
        "%s",
        "{}",
        "NULL",
        "\t",
    ),
    *("pg_eventstream:permission", "pg_eventstream", "a,b", "\x01", "\x7f"),
]


@pytest.fixture(scope="module", params=["UTF8", "LATIN1", "SQL_ASCII"])
def encoded(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[Database]:
    """A migrated database of this encoding."""
    name = f"encoded_{request.param}".lower()
    server = Database(postgres, "postgres")
    server.execute(
        f"CREATE DATABASE {name} ENCODING '{request.param}' LOCALE 'C' TEMPLATE template0"
    )
    encoded = Database(postgres, name)
    with as_default(encoded):
        call_command("migrate", "pg_eventstream", verbosity=0)
    yield encoded
    server.execute(f"DROP DATABASE {name} WITH (FORCE)")


def names_for(database: Database) -> list[str]:
    encoding = database.value("SHOW server_encoding")
    return [*ASCII, *LATIN, *(UNICODE if encoding != "LATIN1" else [])]


def test_slot_in_sql_is_that_of_python(encoded: Database) -> None:
    names = names_for(encoded)
    with encoded.connect(client_encoding="UTF8") as connection:
        found = connection.execute(
            f"SELECT name, {slot_sql('name')} FROM unnest(%s::text[]) AS name", [names]
        ).fetchall()
    assert found == [(name, slot_of(name)) for name in names]
    assert {slot for _, slot in found} == {*range(16)}


def test_followed_channels_in_sql_are_those_of_python(encoded: Database) -> None:
    names = names_for(encoded)
    filters: list[tuple[list[str], list[str]]] = [
        ([], []),
        (["orders", "ü", "%"], []),
        ([], ["a", "é", "pg_event", "\\", "%"]),
        (["ü", "'; --"], ["ß", " "]),
    ]
    with encoded.connect(client_encoding="UTF8") as connection:
        for channels, prefixes in filters:
            found = connection.execute(
                "SELECT name FROM unnest(%(names)s::text[]) AS name WHERE "
                + follows_sql("name", "%(channels)s::text[]", "%(prefixes)s::text[]"),
                {"names": names, "channels": channels, "prefixes": prefixes},
            ).fetchall()
            assert [name for (name,) in found] == [
                name for name in names if follows(name, channels, prefixes)
            ]


def test_consumer_handles_channels_of_any_name(encoded: Database) -> None:
    names = [name for name in names_for(encoded) if not name.startswith("pg_eventstream:")]
    handled: list[str] = []
    own = consumer("stock", start="earliest")(lambda event: handled.append(event.channel))
    del declare._declared["stock"]
    with as_default(encoded):
        send_events([(name, "message", n) for n, name in enumerate(names)])
        assert own.drain() == len(names)
    assert sorted(handled) == sorted(names)
