"""An application of the package eventsourcing, and a projection of its events."""

from __future__ import annotations

from typing import Any

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from eventsourcing.persistence import Tracking
from eventsourcing.postgres import PostgresTrackingRecorder
from eventsourcing.projection import Projection, ProjectionRunner

from .consuming import EFFECT


class Line(Aggregate):  # type: ignore[misc]
    @event("Written")  # type: ignore[untyped-decorator]
    def __init__(self, channel: str, text: str) -> None:
        self.channel = channel
        self.text = text


class Lines(Application[Any]):  # type: ignore[misc]
    name = "lines"


class Effects(PostgresTrackingRecorder):  # type: ignore[misc]
    def add(self, number: int, tracking: Tracking) -> None:
        with self.datastore.transaction(commit=True) as cursor:
            self._insert_tracking(cursor, tracking)
            cursor.execute(EFFECT, [number], prepare=True)


class EffectProjection(Projection[Effects]):  # type: ignore[misc]
    name = "effects"

    def process_event(self, domain_event: Any, tracking: Tracking) -> None:
        self.view.add(tracking.notification_id, tracking)


def runner() -> ProjectionRunner[Lines, Effects]:
    return ProjectionRunner(
        application_class=Lines, projection_class=EffectProjection, view_class=Effects
    )
