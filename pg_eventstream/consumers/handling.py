"""The transaction in which events are handled, on Django's connection of this thread."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress

import django.db
import psycopg
from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from .. import tracing
from ..errors import EventStreamError
from . import checkpoints
from .checkpoints import Connection, Move
from .declaration import Declaration
from .event import ConsumedEvent

#: What another transaction caused, so that trying again at once is right.
_TRANSIENT = (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected)


ENDED = "The handler ended its transaction with a statement of its own (COMMIT or ROLLBACK)."


class SlotLost(Exception):
    """Another process or a command has moved the checkpoint."""


class HandlerError(EventStreamError):
    """The handler left the transaction in a state in which it cannot be committed."""


class TransactionEnded(HandlerError):
    """The handler ended the transaction by itself, so it could be committed."""


def raw_connection(alias: str) -> Connection:
    """The psycopg connection that Django uses in this thread."""
    wrapper = connections[alias]
    wrapper.ensure_connection()
    connection: Connection = wrapper.connection
    return connection


@contextmanager
def moving(
    alias: str,
    consumer_id: int,
    moves: list[Move],
    incarnation: int,
    *,
    is_locked: bool = False,
    forget: Iterable[int] = (),
) -> Iterator[Connection]:
    """A transaction that moves checkpoints. Raises `SlotLost` if others have moved them.

    With ``is_locked`` it locks them first and moves them last, and raises `TransactionEnded` if the
    transaction was ended in between. Without, it moves them first, which saves a statement.
    ``forget`` are slots whose failures are over if it commits.
    """
    with transaction.atomic(using=alias):
        connection = raw_connection(alias)
        if is_locked:
            is_held = checkpoints.begin_locked(connection, consumer_id, moves)
        else:
            is_held = checkpoints.begin_moving(connection, consumer_id, moves, incarnation)
        if not is_held:
            raise SlotLost
        yield connection
        check_transaction(alias, connection)
        if is_locked and not checkpoints.move_locked(connection, consumer_id, moves, incarnation):
            if not checkpoints.is_marked(connection):
                raise TransactionEnded(ENDED)
            raise SlotLost
        # Last, because other threads write to this row.
        for slot in forget:
            checkpoints.forget_failure(connection, consumer_id, slot)
        checkpoints.commit(connection)


def call(consumer: Declaration, event: ConsumedEvent, *, traces: bool) -> None:
    """Call the handler. Raises what it raises, and `HandlerError` if it is asynchronous.

    With ``traces`` the call is a span in the trace of the event.
    """
    if traces:
        with tracing.handling(consumer.name, event.id, event.channel, event.meta):
            result = consumer.handler(event)
    else:
        result = consumer.handler(event)
    if result is not None and isinstance(result, Coroutine):
        result.close()
        raise HandlerError(
            "The handler returned a coroutine, which nobody awaits. Call asynchronous code with"
            " asgiref.sync.async_to_sync."
        )


def check_transaction(alias: str, connection: Connection) -> None:
    """Raise `HandlerError` unless the transaction can be committed.

    Django would roll it back without an error, and so would PostgreSQL.
    """
    wrapper = connections[alias]
    status = connection.info.transaction_status
    if wrapper.connection is not connection or connection.closed:
        raise HandlerError(
            "The handler closed the connection of the events' database, so its work is lost."
        )
    if status == psycopg.pq.TransactionStatus.INERROR:
        raise HandlerError(
            "The handler caught an error of the database and returned, but the error has broken its"
            " transaction. Put the statement that can fail into transaction.atomic(), and catch the"
            " error outside of that."
        )
    if status != psycopg.pq.TransactionStatus.INTRANS:
        raise TransactionEnded(ENDED)
    if wrapper.needs_rollback:
        raise HandlerError(
            "The handler returned, but has called transaction.set_rollback(True), or has caught an"
            " error that broke an atomic block. Raise the error instead."
        )


def is_broken(wrapper: BaseDatabaseWrapper) -> bool:
    return wrapper.connection is None or wrapper.connection.closed


def forget_connection(wrapper: BaseDatabaseWrapper) -> None:
    with suppress(django.db.Error):
        wrapper.close()


def is_transient(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, _TRANSIENT):
            return True
        error = error.__cause__
    return False


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().rstrip(":")
