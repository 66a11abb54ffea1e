"""Senders of the model test: real transactions, each on a separate connection."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

from django.db import connections, transaction

from pg_eventstream import NewEvent, channel_permission_changed, send_event, send_events
from pg_eventstream.channels import PERMISSION_CHANGES
from tests.model.model import Event, Grant, Model, Transaction
from tests.model.world import POISON, World
from tests.project.app.models import Membership


@dataclass(frozen=True)
class Send:
    """One event on each of some channels."""

    where: list[str]
    how: str
    skipped: set[str]
    length: int
    poisonous: bool


@dataclass(frozen=True)
class Permit:
    """Grant or revoke the right to read a channel."""

    user: str
    channel: str
    granted: bool


class Senders:
    def __init__(self, world: World, model: Model) -> None:
        self._world = world
        self._model = model
        self.open: dict[str, Transaction] = {}
        self.prepared: dict[str, Transaction] = {}
        self._numbers = itertools.count()  # of prepared transactions
        self._sent = 0

    def act(self, sender: str, act: Send | Permit | str) -> None:
        """Act in the sender's open transaction, or in a new one."""
        if sender not in self.open:
            transaction.set_autocommit(False, sender)
            self.open[sender] = Transaction()
        own = self.open[sender]
        if isinstance(act, Send):
            self._send(sender, act, own)
        elif isinstance(act, Permit):
            self._permit(sender, act, own)
        else:
            self._savepoint(sender, act, own)

    def _send(self, sender: str, act: Send, own: Transaction) -> None:
        ids = [self._world.user_id(user) for user in sorted(act.skipped)]
        new = []
        for channel in act.where:
            self._sent += 1
            data = f"{self._sent} %I\n{POISON if act.poisonous else 'x'}{'x' * act.length}"
            new.append(NewEvent(channel, "message", data, ids, json_encode=False))
            own.done.append(Event(channel, data, frozenset(ids)))
        if act.how == "send_events":
            send_events(new, using=sender)
        elif act.how == "send_event":
            for event in new:
                send_event(*event[:4], json_encode=False, using=sender)
        else:
            for event in new:
                self._execute(
                    sender,
                    "INSERT INTO pg_eventstream_event (channel, data, skip_user_ids)"
                    " VALUES (%s, %s, %s)",
                    [event.channel, event.data, ids],
                )

    def _permit(self, sender: str, act: Permit, own: Transaction) -> None:
        user, right = self._world.users[act.user], (self._world.user_id(act.user), act.channel)
        others = [*self.open.values(), *self.prepared.values()]
        if any(right in other.rights for other in others if other is not own):
            return  # it would wait for the end of the other
        row = {"user_id": user and user.pk, "channel": act.channel}
        if act.granted:
            Membership.objects.using(sender).create(**row)
            own.done.append(Grant(right))
        else:
            Membership.objects.using(sender).filter(**row).delete()
            channel_permission_changed(user, act.channel, using=sender)
            data = json.dumps({"user": right[0], "channel": act.channel})
            own.done.append(Event(PERMISSION_CHANGES, data, revokes=right))

    def _savepoint(self, sender: str, act: str, own: Transaction) -> None:
        if act == "SAVEPOINT":
            self._execute(sender, "SAVEPOINT s")
            own.savepoints.append(len(own.done))
        elif own.savepoints:
            start = own.savepoints.pop()
            if act == "ROLLBACK TO":
                self._execute(sender, "ROLLBACK TO s")
                del own.done[start:]
            self._execute(sender, "RELEASE s")

    def end(self, sender: str, how: str) -> None:
        own = self.open.pop(sender)
        if how == "COMMIT":
            self._model.begin_commit(own)
            transaction.commit(sender)
            self._model.commit(own)
        elif how == "ROLLBACK":
            transaction.rollback(sender)
        else:
            name = f"{sender} {next(self._numbers)}"
            self._execute(sender, "SET LOCAL pg_eventstream.bell = off")
            self._execute(sender, f"PREPARE TRANSACTION '{name}'")
            self._model.begin_commit(own)
            self.prepared[name] = own
        transaction.set_autocommit(True, sender)

    def end_prepared(self, number: int, how: str) -> None:
        name = list(self.prepared)[number % len(self.prepared)]
        self._world.connection.execute(f"{how} PREPARED '{name}'")
        prepared = self.prepared.pop(name)
        if how == "COMMIT":
            self._model.commit(prepared)

    def sequence_and_end(self, sender: str, how: str) -> None:
        """Call sequence() before the end: its own events are left for the next call."""
        with connections[sender].cursor() as cursor:
            cursor.execute("SELECT pg_eventstream_sequence()")
            assert cursor.fetchone() == (len(self._model.waiting),)
        if how == "COMMIT":
            self._model.sequence()
        self.end(sender, how)

    def _execute(self, sender: str, statement: str, params: list[Any] | None = None) -> None:
        with connections[sender].cursor() as cursor:
            cursor.execute(statement, params)
