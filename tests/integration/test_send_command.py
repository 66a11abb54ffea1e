"""``eventstream_send`` sends one event, or those of standard input, all of them or none."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from pg_eventstream.management import sending
from pg_eventstream.management.progress import Progress
from pg_eventstream.management.sending import Sender
from tests.support.database import Database


def send(*arguments: str, lines: bytes | str | None = None) -> str:
    out = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        if lines is not None:
            data = lines if isinstance(lines, bytes) else lines.encode()
            patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        call_command("eventstream_send", *arguments, stdout=out, stderr=StringIO())
    return out.getvalue()


def stored(database: Database) -> list[tuple[Any, ...]]:
    return database.fetch(
        "SELECT channel, type, data, skip_user_ids, meta FROM pg_eventstream_event ORDER BY id"
    )


@pytest.mark.parametrize(
    ("arguments", "data", "skipped"),
    [
        (['{"order":  1.10}'], '{"order":  1.10}', []),
        (["null"], "null", []),
        (["-5"], "-5", []),
        (["--text", "--", "-not- JSON\nsecond"], "-not- JSON\nsecond", []),
        (["--text", "{"], "{", []),
        (["1", "--skip", "7", "--skip", "8"], "1", ["7", "8"]),
    ],
)
def test_one_event_is_sent_as_it_is_written(
    database: Database, arguments: list[str], data: str, skipped: list[str]
) -> None:
    options = [a for a in arguments if a == "--text"]
    rest = [a for a in arguments if a != "--text"]
    assert send(*options, "room", "paid", *rest) == "1 event sent.\n"
    assert stored(database) == [("room", "paid", data, skipped, None)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["room", "paid"], "Give CHANNEL, TYPE and DATA, or - alone"),
        (["room"], "Give CHANNEL, TYPE and DATA, or - alone"),
        (["room", "paid", "{order"], "DATA is not JSON: .* use --text"),
        (["room", "paid", "NaN"], "DATA is not JSON: NaN is not JSON"),
        (["room", "paid", "[" * 100_000], "DATA is not JSON: it is nested too deeply"),
        (["room", "stream-open", "1"], "is reserved"),
        (["pg_eventstream:permission", "paid", "1"], "are reserved"),
        (["", "paid", "1"], "must not be empty"),
        (["room", "paid", "a\0b", "--text"], "must not contain NUL"),
        (["room", "paid", "1", "--batch", "2"], "--batch is only for"),
        (["room", "paid", "1", "--database", "nowhere"], "is not in DATABASES"),
        (["-", "paid"], "everything about the events comes from the lines"),
        (["-", "--skip", "7"], "everything about the events comes from the lines"),
        (["-", "--batch", "0"], "must be at least 1"),
    ],
)
def test_wrong_arguments_send_nothing(
    database: Database, arguments: list[str], message: str
) -> None:
    with pytest.raises(CommandError, match=message):
        send(*arguments, lines="")
    assert stored(database) == []


def test_lines_are_sent_in_order_in_one_transaction(database: Database) -> None:
    lines = [
        {"channel": "a", "data": {"n": 1}},
        {"channel": "b", "type": "paid", "data": "ü", "skip_user_ids": [7, "8"]},
        {"channel": "a", "data": None, "meta": {"cause": "test"}},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    assert send("-", lines=text) == "3 events sent.\n"
    assert stored(database) == [
        ("a", "message", '{"n": 1}', [], None),
        ("b", "paid", '"\\u00fc"', ["7", "8"], None),
        ("a", "message", "null", [], {"cause": "test"}),
    ]
    assert database.value("SELECT count(DISTINCT xid) FROM pg_eventstream_outbox") == 1


def test_strings_in_lines_are_sent_unchanged_with_text(database: Database) -> None:
    assert send("-", "--text", lines='{"channel": "a", "data": "<b>1</b>"}') == "1 event sent.\n"
    assert stored(database) == [("a", "message", "<b>1</b>", [], None)]


GOOD = b'{"channel": "a", "data": 1}\n'
INVALID = {
    b"nonsense": "it is not JSON",
    b"[1]": "it is not a JSON object",
    b'{"channel": "a", "data": NaN}': "NaN is not JSON",
    b"[" * 100_000: "nested too deeply",
    b'{"channel": "a"}': "it has no data",
    b'{"type": "a"}': "it has no channel and no data",
    b'{"channel": "a", "data": 1, "room": "b"}': "unknown keys: 'room'",
    b'{"channel": "", "data": 1}': "must not be empty",
    b'{"channel": 7, "data": 1}': "must be a string",
    b'{"channel": "a", "data": 1, "type": null}': "must be a string",
    b'{"channel": "a", "data": 1, "skip_user_ids": "7"}': "must be a list of user ids",
    b'{"channel": "a", "data": 1, "skip_user_ids": [[7]]}': "must be a list of user ids",
    b'{"channel": "a", "data": 1, "meta": 7}': "must be a mapping",
    b'{"channel": "a", "data": 1, "meta": {"a": "\\u0000"}}': "must not contain NUL",
    b'{"channel": "\xff", "data": 1}': "it is not UTF-8",
    b'{"channel": "\\ud800", "data": 1}': "is not valid Unicode",
}


@pytest.mark.parametrize("batch", [[], ["--batch", "10"]], ids=["together", "in batches"])
@pytest.mark.parametrize("line", INVALID)
def test_invalid_line_is_named_and_nothing_is_sent(
    database: Database, line: bytes, batch: list[str]
) -> None:
    with pytest.raises(CommandError, match=r"^Line 3: ") as refusal:
        send("-", *batch, lines=GOOD + b"\n" + line + b"\n" + GOOD)
    assert INVALID[line] in str(refusal.value)
    assert str(refusal.value).endswith("\nNothing was sent.")
    assert stored(database) == []


def test_all_invalid_lines_are_named_up_to_ten(database: Database) -> None:
    with pytest.raises(CommandError) as refusal:
        send("-", lines=GOOD + b"x\n" * 12 + GOOD)
    lines = str(refusal.value).splitlines()
    assert [line.split(":")[0] for line in lines[:10]] == [f"Line {n}" for n in range(2, 12)]
    assert lines[10:] == ["2 more lines are invalid.", "Nothing was sent."]
    assert stored(database) == []


def test_batches_are_transactions_and_an_error_says_what_was_sent(database: Database) -> None:
    with pytest.raises(CommandError) as refusal:
        send("-", "--batch", "2", lines=GOOD * 5 + b"x\n" + GOOD)
    assert str(refusal.value).splitlines()[1:] == [
        "4 events were sent, up to line 4. Send the lines after it again."
    ]
    assert database.fetch("SELECT count(*) FROM pg_eventstream_outbox GROUP BY xid") == [(2,), (2,)]
    assert send("-", "--batch", "2", lines=GOOD * 4) == "4 events sent.\n"


def test_interrupted_command_says_what_was_sent(database: Database) -> None:
    def lines() -> Iterator[bytes]:
        yield from [GOOD] * 3
        raise KeyboardInterrupt

    def sent(batch: int | None) -> str:
        sender = Sender("default", batch=batch, raw=False, progress=lambda events, read: None)
        with pytest.raises(sending.Interrupted) as interrupted:
            sender.send(lines())
        return str(interrupted.value)

    assert sent(None) == "Interrupted. Nothing was sent."
    assert (
        sent(2) == "Interrupted. 2 events were sent, up to line 2. Send the lines after it again."
    )
    assert len(stored(database)) == 2


def test_error_of_the_database_says_what_was_sent(database: Database) -> None:
    database.execute(
        "ALTER TABLE pg_eventstream_event ADD CONSTRAINT of_the_project CHECK (data <> '3')"
    )
    lines = "".join(f'{{"channel": "a", "data": {n}}}\n' for n in range(6))
    with pytest.raises(
        CommandError, match=r"of_the_project(.|\n)*2 events were sent, up to line 2"
    ):
        send("-", "--batch", "2", lines=lines)
    with pytest.raises(CommandError, match=r"of_the_project(.|\n)*Nothing was sent"):
        send("-", lines=lines)


def test_memory_does_not_grow_with_the_input(database: Database) -> None:
    def lines() -> Iterator[bytes]:
        line = json.dumps({"channel": "a", "data": "x" * 20_000}).encode()
        for _ in range(1500):
            yield line

    tracemalloc.start()
    try:
        sender = Sender("default", batch=None, raw=False, progress=lambda events, read: None)
        assert sender.send(lines()) == 1500
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 25_000_000  # of 30 MB, in pages of 4 MB that are copied to be sent


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.5, "\r[###############               ]  50%  1,000 events\x1b[K"),
        (None, "\r1,000 events\x1b[K"),
    ],
    ids=["file", "pipe"],
)
def test_progress(share: float | None, shown: str) -> None:
    from django.core.management.base import OutputWrapper

    out = StringIO()
    progress = Progress(OutputWrapper(out))
    progress.show("1,000 events", share)
    progress.show("1,001 events", share)  # too soon to be shown
    assert out.getvalue() == shown
    progress.end()
    assert out.getvalue() == shown + "\r\x1b[K"
