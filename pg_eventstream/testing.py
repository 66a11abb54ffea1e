"""For the tests of a project: the events that were sent, without a publisher or a commit.

`captured_events` works in any test; the fixture `sent_events` is for pytest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from asgiref.sync import sync_to_async
from django.db import Error, connections

from .channels import PERMISSION_CHANGES, RESERVED
from .conf import conf
from .stream_event import parse_change

if TYPE_CHECKING:
    from .consumers import Consumer
    from .consumers.declaration import Declaration
    from .consumers.delivery import Delivery

__all__ = ["SentEvent", "SentEvents", "captured_events"]


@dataclass(frozen=True, slots=True)
class SentEvent:
    """An event as it was sent. ``data`` is the text on the wire; `json` parses it."""

    channel: str
    type: str
    data: str
    skip_user_ids: tuple[str, ...] = ()
    meta: Any = None

    def json(self) -> Any:
        return json.loads(self.data)

    def __repr__(self) -> str:
        # Without defaults, because unittest shortens what it shows of two sides that differ.
        values = {name: getattr(self, name) for name in ("channel", "type", "data")}
        if self.skip_user_ids:
            values["skip_user_ids"] = self.skip_user_ids
        if self.meta is not None:
            values["meta"] = self.meta
        return f"SentEvent({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def captured_events(
    using: str | None = None,
    *,
    deliver: bool = False,
    consumers: Iterable[Consumer] | None = None,
) -> SentEvents:
    """Capture the events sent in a block: ``with captured_events() as sent:``.

    Inside the block, each access to ``sent`` reads the database. After the block, it contains the
    events at the end of the block. In asynchronous code use ``async with``, and access ``sent``
    after the block.

    It captures every event that was inserted in any way during the block and is visible to Django's
    connection: events of this connection that were not rolled back, committed or not, and committed
    events of others (threads, a live server). A block that breaks its transaction, so that the
    database refuses further statements, has sent nothing.

    With ``deliver`` it runs the consumers that follow the events' channels, at the end of the block
    and whenever `SentEvents.deliver` is called: see there. Inside the block `Consumer.wait` does
    the same and returns at once: True, unless the consumer is not one of ``consumers``. Without
    ``consumers``, all that are declared run.

    ``using`` is a database alias, by default ``EVENTSTREAM_DATABASE``. The database is read at the
    beginning and at the end of the block. Raises `django.db.Error`, and what a handler raises.
    """
    return SentEvents(using or conf.database, deliver, consumers)


class SentEvents(Sequence[SentEvent]):
    """The events of a block, in the order in which they were sent. Equals a list of them."""

    def __init__(
        self, using: str, deliver: bool = False, consumers: Iterable[Consumer] | None = None
    ) -> None:
        self._using = using
        self._delivers = deliver
        self._consumers = consumers
        self._delivery: Delivery | None = None
        self._block = ExitStack()
        self._begin = 0
        self._final: list[SentEvent] | None = None

    def deliver(self) -> None:
        """Run the consumers on what was sent in the block and is not handled yet.

        It handles the events in order, and then those that the handlers have sent, until there is
        nothing left. Each handler runs in a savepoint of the test's transaction. If it raises, that
        is rolled back, and this raises the same; nothing is tried again or parked. Events of
        unreliable channels are not handled, as in production.
        """
        self._prepare().run()

    def _deliver_for(self, consumer: Declaration) -> bool:
        self.deliver()
        return consumer in self._prepare().consumers

    def _prepare(self) -> Delivery:
        if self._delivery is None:
            # Here, because pytest imports this module before Django is configured.
            from .consumers.declare import discover
            from .consumers.delivery import Delivery

            consumers = discover().values() if self._consumers is None else self._consumers
            self._delivery = Delivery(self._using, consumers, self._begin)
        return self._delivery

    @property
    def permission_changes(self) -> list[tuple[str, str]]:
        r"""The calls of `channel_permission_changed`, which send no event to clients.

        For each call, the user's id as text ("anonymous" for None) and the channel. (A user whose
        primary key is exactly that text is "\anonymous".)
        """
        return [
            parse_change(event.data)
            for event in self._everything()
            if event.channel == PERMISSION_CHANGES
        ]

    @overload
    def __getitem__(self, index: int) -> SentEvent: ...
    @overload
    def __getitem__(self, index: slice) -> list[SentEvent]: ...
    def __getitem__(self, index: int | slice) -> SentEvent | list[SentEvent]:
        return self._events()[index]

    def __iter__(self) -> Iterator[SentEvent]:
        return iter(self._events())

    def __len__(self) -> int:
        return len(self._events())

    def __eq__(self, other: object) -> bool:
        return self._events() == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._events())

    def __enter__(self) -> SentEvents:
        # The sequence of the ids, instead of the highest id: it includes uncommitted events of
        # other sessions, and a rollback does not reset it.
        with connections[self._using].cursor() as cursor:
            cursor.execute(
                "SELECT coalesce(pg_sequence_last_value("
                "pg_get_serial_sequence('pg_eventstream_event', 'id')::regclass), 0)"
            )
            (self._begin,) = cursor.fetchone()
        if self._delivers:
            from .consumers.waiting import delivering

            self._block.enter_context(delivering(self._using, self._deliver_for))
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            with self._block:
                if self._delivers and exc_type is None:
                    self.deliver()
        finally:
            self._end(exc_type)

    def _end(self, exc_type: type[BaseException] | None) -> None:
        try:
            self._final = self._everything()
        except Error:
            # The block's own exception gives the reason; this one must not hide it.
            if exc_type is None:
                raise
            self._final = []

    async def __aenter__(self) -> SentEvents:
        return await sync_to_async(self.__enter__)()

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        await sync_to_async(self.__exit__)(exc_type)

    def _events(self) -> list[SentEvent]:
        return [e for e in self._everything() if not e.channel.startswith(RESERVED)]

    def _everything(self) -> list[SentEvent]:
        if self._final is not None:
            return self._final
        with connections[self._using].cursor() as cursor:
            cursor.execute(
                "SELECT channel, type, data, skip_user_ids, meta::text FROM pg_eventstream_event"
                " WHERE id > %s ORDER BY id",
                [self._begin],
            )
            rows = cursor.fetchall()
        return [
            SentEvent(channel, type_, data, tuple(skip), None if meta is None else json.loads(meta))
            for channel, type_, data, skip, meta in rows
        ]


try:
    import pytest
except ImportError:
    pass
else:

    @pytest.fixture
    def sent_events(request: pytest.FixtureRequest) -> Iterator[SentEvents]:
        """The events that the test sends. With pytest-django it requests the fixture ``db``."""
        if request.config.pluginmanager.hasplugin("django"):
            request.getfixturevalue("db")
        with captured_events() as sent:
            yield sent
