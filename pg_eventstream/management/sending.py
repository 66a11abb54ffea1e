"""Sends events that are read as JSON lines: the work of ``eventstream_send -``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from django.db import transaction

from ..errors import EventStreamError, InvalidEvent
from ..send import NewEvent, Row, insert_many, parse_json, to_row

#: Events are written in statements of at most this many, and of about this many characters.
_PAGE_EVENTS = 1000
_PAGE_CHARACTERS = 4_000_000
#: Invalid lines are named up to this number.
_MOST_NAMED = 10
_KEYS = {"channel", "type", "data", "skip_user_ids", "meta"}


class InvalidLines(EventStreamError):
    """Lines that are not valid events. The message names them by their numbers."""


class Interrupted(EventStreamError):
    """Ctrl-C before everything was sent. The message says how many events were."""


class Sender:
    """Sends events from lines of bytes, and holds one page of them in memory.

    Without ``batch`` all events are sent in one transaction. Otherwise each ``batch`` events are
    committed, and an error leaves the earlier batches sent. ``using`` is a database alias. With
    ``raw`` the data are strings that are sent unchanged. ``progress`` is called with the number of
    events that were written, and the number of bytes that were read.
    """

    def __init__(
        self,
        using: str,
        *,
        batch: int | None,
        raw: bool,
        progress: Callable[[int, int], object],
    ) -> None:
        self._using = using
        self._batch = batch
        self._raw = raw
        self._progress = progress
        self._line = self._bytes = 0
        #: The number of events that are committed.
        self.sent = 0
        #: The number of the last line whose event is committed.
        self.last_line = 0

    def send(self, lines: Iterable[bytes]) -> int:
        """Send all events. Returns their number.

        Raises `InvalidLines`, `Interrupted` and ``django.db.Error``.
        """
        rows = self._rows(lines)
        try:
            while self._send_batch(rows) and self._batch:
                pass
        except KeyboardInterrupt as e:
            raise Interrupted(f"Interrupted. {self.so_far()}") from e
        return self.sent

    def so_far(self) -> str:
        """What has become of the events until now, for the message of an error."""
        if not self.sent:
            return "Nothing was sent."
        return (
            f"{self.sent} events were sent, up to line {self.last_line}. Send the lines after it"
            " again."
        )

    def _send_batch(self, rows: Iterator[Row]) -> int:
        """Send the next batch, or everything. Returns the number of its events."""
        written = 0
        with transaction.atomic(using=self._using):
            for page in _pages(islice(rows, self._batch)):
                insert_many(page, self._using)
                written += len(page)
                self._progress(self.sent + written, self._bytes)
        self.sent += written
        self.last_line = self._line
        return written

    def _rows(self, lines: Iterable[bytes]) -> Iterator[Row]:
        invalid: list[str] = []
        count = 0
        for self._line, line in enumerate(lines, start=1):
            self._bytes += len(line)
            if not line.strip():
                continue
            try:
                row = to_row(parse_line(line, raw=self._raw))
            except ValueError as e:
                count += 1
                if count <= _MOST_NAMED:
                    invalid.append(f"Line {self._line}: {e}")
                if self._batch:
                    break
                continue
            if not count:
                yield row
        if count:
            if count > _MOST_NAMED:
                invalid.append(f"{count - _MOST_NAMED} more lines are invalid.")
            raise InvalidLines("\n".join([*invalid, self.so_far()]))


def _pages(rows: Iterable[Row]) -> Iterator[list[Row]]:
    page: list[Row] = []
    characters = 0
    for row in rows:
        page.append(row)
        characters += len(row[2]) + len(row[4] or "")
        if len(page) == _PAGE_EVENTS or characters >= _PAGE_CHARACTERS:
            yield page
            page, characters = [], 0
    if page:
        yield page


def parse_line(line: bytes, *, raw: bool) -> NewEvent:
    """The event in a line. Raises ValueError if it is not one."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"it is not UTF-8 ({e})") from e
    try:
        found = parse_json(text)
    except ValueError as e:
        raise ValueError(f"it is not JSON ({e})") from e
    if not isinstance(found, dict):
        raise ValueError('it is not a JSON object, such as {"channel": "news", "data": {}}')
    if unknown := found.keys() - _KEYS:
        raise ValueError(f"it has unknown keys: {', '.join(map(repr, sorted(unknown)))}")
    if missing := [key for key in ("channel", "data") if key not in found]:
        raise ValueError(f"it has no {' and no '.join(missing)}")
    skip = found.get("skip_user_ids") or []
    if not isinstance(skip, list) or not all(isinstance(one, str | int) for one in skip):
        raise InvalidEvent("skip_user_ids must be a list of user ids.")
    return NewEvent(
        found["channel"],
        found.get("type", "message"),
        found["data"],
        skip,
        not raw,
        found.get("meta"),
    )
