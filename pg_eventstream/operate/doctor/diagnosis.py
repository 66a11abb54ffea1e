"""Finds out why probes did not arrive as they should, from what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
from django.conf import settings
from django.db import DatabaseError

from ...conf import conf
from ...grip.next_links import EXEMPT
from ...postgres.connector import explain
from ..findings import Finding
from . import opening
from .measured import Measured, Steady, Way
from .opening import broken, degraded

# A single event that takes longer is late: no part of the way waits for that long.
_LATE_SECONDS = 1.0
_SLOW_SECONDS = 0.1
# A signature of Pushpin is valid for an hour, and a token of the doctor for five minutes.
_CLOCK_SECONDS = 30.0

_NO_PUBLISHER = {
    "no-publisher", "publisher-elsewhere", "publisher-gone", "publisher-silent",
    "publisher-may-not-sequence", "publisher-without-listen",
}  # fmt: skip
#: Findings that only say where a probe was last seen, and those that explain them.
_EXPLAINED_BY = {
    "not-sequenced": {*_NO_PUBLISHER, "functions-missing", "trigger-broken", "events-wait"},
    "not-published": {*_NO_PUBLISHER, "proxy-not-served", "proxy-unreachable", "proxy-late"},
    "not-received": {*_NO_PUBLISHER, "proxy-not-served", "prefix-differs", "buffered"},
    "late": {*_NO_PUBLISHER, "proxy-late", "proxy-unreachable", "buffered"},
}


def diagnose(
    measured: Measured, known: Iterable[Finding], publisher: dict[str, Any]
) -> list[Finding]:
    """What is wrong, the worst first. ``publisher`` is what the publisher reports of itself.

    ``known`` are the findings that need no probe. They come first among equals.
    """
    found = {finding.code: finding for finding in known}
    for finding in _find(measured, publisher):
        found.setdefault(finding.code, finding)
    left = [f for f in found.values() if not _is_explained(f, found)]
    return sorted(left, key=lambda finding: finding.level != "broken")


def _is_explained(symptom: Finding, found: dict[str, Finding]) -> bool:
    causes = [found[code] for code in _EXPLAINED_BY.get(symptom.code, ()) if code in found]
    # A degraded part does not explain a broken way.
    return any(cause.level in ("broken", symptom.level) for cause in causes)


def _find(measured: Measured, publisher: dict[str, Any]) -> Iterator[Finding]:
    if measured.refused is not None:
        yield _explain_refusal(measured.refused)
    yield from opening.find(measured)
    description = measured.description or {}
    if measured.reads_another_table:
        yield broken(
            "another-database",
            f"The application behind {measured.url} reads events from another database than the"
            " one to which this command sends (EVENTSTREAM_DATABASE, or --database).",
            "Compare DATABASES, EVENTSTREAM_DATABASE and the environment of the application and of"
            " this command, and of the publisher. All three need the same tables.",
        )
    if measured.is_proxied:
        yield from _compare_prefixes(description, publisher)
    yield from _compare_clocks(measured)
    if measured.probe is not None:
        yield from _follow(measured, measured.probe)
    if measured.has_stopped:
        yield _explain_stop(measured)
    if measured.steady is not None:
        yield from _judge_steady(measured, measured.steady)
    if measured.resumed is not None and not measured.has_resumed:
        yield _explain_resume(measured.resumed)


def _explain_refusal(error: DatabaseError) -> Finding:
    cause = error.__cause__
    text = explain(cause) if isinstance(cause, psycopg.Error) else str(error)
    if isinstance(cause, psycopg.errors.ReadOnlySqlTransaction):
        return broken(
            "database-is-standby",
            f"An event cannot be sent, because the database only reads: {text}.",
            "Connect to the primary. If DATABASES names several hosts, add"
            ' "target_session_attrs": "read-write" to OPTIONS.',
        )
    return broken(
        "cannot-send",
        f"An event cannot be sent: {text}.",
        "Send as a role with the GRANTs of a sender, in a database whose migrations are applied:"
        " manage.py check --database default, manage.py migrate.",
    )


def _compare_prefixes(description: dict[str, Any], publisher: dict[str, Any]) -> Iterator[Finding]:
    ours = description.get("grip_prefix", "")
    theirs = publisher.get("grip_prefix", conf.grip_prefix)
    if ours != theirs:
        yield broken(
            "prefix-differs",
            f"The publisher publishes with GRIP_PREFIX = {theirs!r}, but the application opens"
            f" streams with GRIP_PREFIX = {ours!r}, so no event finds its stream.",
            f"Set GRIP_PREFIX to the same value for both, for example GRIP_PREFIX = {ours!r}, and"
            " restart the one that you changed.",
        )


def _compare_clocks(measured: Measured) -> Iterator[Finding]:
    for whose, seconds in measured.clocks.items():
        if abs(seconds) > _CLOCK_SECONDS:
            yield degraded(
                "clocks-differ",
                f"The clock of the {whose} is {abs(seconds):.0f} seconds"
                f" {'ahead of' if seconds > 0 else 'behind'} the one of this machine. Signatures,"
                " tokens and next links expire by these clocks.",
                "Let NTP set all clocks (timedatectl set-ntp true).",
            )


def _follow(measured: Measured, way: Way) -> Iterator[Finding]:
    """Follow the single probe to the station at which it is missing or late."""
    stations = [("sequenced", way.sequenced)]
    if measured.is_proxied and conf.grip_proxies:
        # If it was received, it was published, even if the proxy has not acknowledged it so far.
        stations.append(("published", way.published or way.received))
    stations.append(("received", way.received))
    if way.received is not None and measured.description and not measured.is_proxied:
        stations = stations[-1:]  # without a proxy, only what arrives counts
    gaps, before = {}, 0.0
    for station, seconds in stations:
        if seconds is None and way.received is None:
            yield _explain_missing(measured, station)
            return
        if seconds is not None:
            gaps[station], before = seconds - before, seconds
    if before > _LATE_SECONDS:
        longest = max(gaps, key=gaps.__getitem__)
        yield _explain_late(longest, before)


def _explain_missing(measured: Measured, station: str) -> Finding:
    if measured.was_held_back:
        return opening.held_back("a single event arrives only when others push it out")
    if station == "sequenced":
        return broken(
            "not-sequenced",
            "The probe was committed, but has got no place in the order of events. The publisher"
            " does that, or an ASGI process that streams.",
            "Start the publisher: python manage.py eventstream_publisher. If it runs, its log says"
            " what prevents it.",
        )
    if station == "published":
        return broken(
            "not-published",
            "The probe is in order, but the proxy has not acknowledged it.",
            "The log of the publisher says why the proxy takes nothing. Compare GRIP_URL (or"
            " GRIP_PROXIES) with push_in_http_addr and push_in_http_port in pushpin.conf.",
        )
    if measured.was_closed:
        return _CLOSED
    return broken(
        "not-received",
        "The probe was published, but has not arrived in the stream.",
        "Check that the URL leads to one of the proxies of GRIP_URL (or GRIP_PROXIES), and that"
        " the publisher runs the same version as the application and has the same GRIP_PREFIX.",
    )


_CLOSED = broken(
    "stream-closed",
    "The stream was closed soon after it was opened.",
    "A server between has a time-out that is too short: streams need 30 seconds or more (nginx:"
    " proxy_read_timeout 60s;). Or the application was restarted meanwhile.",
)


def _explain_late(station: str, seconds: float) -> Finding:
    if station == "received":
        return opening.held_back(f"a single event takes {seconds:.1f} seconds", late=True)
    causes = {
        "sequenced": "The publisher was not woken by the event's notification, or it is busy. Its"
        " log says if notifications do not reach it.",
        "published": "The proxy took the event late. The log of the publisher says why.",
    }
    return degraded(
        "late",
        f"A single event takes {seconds:.1f} seconds, most of them before it is {station}.",
        causes[station],
    )


def _explain_stop(measured: Measured) -> Finding:
    """Explain why a stream that was opened does not continue."""
    if measured.was_held_back:
        return opening.held_back("what follows the first event arrives only with more data")
    if measured.was_closed:
        return _CLOSED
    link = measured.link
    ends = (
        "The stream opens, but the proxy cannot continue it: its request for the next link"
        " {problem}. Streams end within a minute, and clients open them again and again."
    )
    if link is not None and link.status == 404:
        return broken(
            "next-link-not-found",
            ends.format(problem="finds nothing (404)"),
            "A component between changes the path that clients request. If it removes a prefix,"
            ' set FORCE_SCRIPT_NAME = "/prefix" in the settings, and let the proxy'
            " route paths with and without the prefix to the application.",
        )
    is_redirected = link is not None and 300 <= link.status < 400
    if is_redirected or settings.SECURE_SSL_REDIRECT:
        where = "" if link is None else link.headers.get("location", "")
        tls = settings.SECURE_SSL_REDIRECT or urlsplit(where).scheme == "https"
        return broken(
            "next-link-redirected",
            ends.format(problem="is redirected" + (f" to {where}" if is_redirected else "")),
            f'Set SECURE_REDIRECT_EXEMPT = [r"{EXEMPT}"] in the settings.'
            if tls
            else "A middleware demands a login. It must let requests through whose"
            " resolver_match.url_name is pg_eventstream-next: their token stands for the user.",
        )
    seen = "" if link is None else f" To the same request this command got status {link.status}."
    return broken(
        "next-link-fails",
        ends.format(problem="fails or gets no answer") + seen,
        "The log of the application says what answers instead (logger pg_eventstream.next_links)."
        " Check that the routes of the proxy (/etc/pushpin/routes) lead all paths of the endpoint"
        " to the application.",
    )


def _judge_steady(measured: Measured, steady: Steady) -> Iterator[Finding]:
    if steady.received < steady.sent or not steady.in_order:
        yield broken(
            "lost",
            f"Of {steady.sent} probes at {steady.rate:.0f} a second, {steady.received} arrived"
            f"{'' if steady.in_order else ', not in order'}.",
            "Look into the logs of the proxy and of the servers in front of it. In pushpin.conf,"
            " message_hwm limits how many messages wait.",
        )
    single = measured.probe.received if measured.probe else None
    if steady.p50 is None or steady.p50 < max(_SLOW_SECONDS, 2 * (single or 0)):
        return
    delays = (
        f"A single event arrives within {single or 0:.3f} seconds, but at {steady.rate:.0f} a"
        f" second half of the events take more than {steady.p50:.3f} seconds"
    )
    if measured.is_proxied and (single or 0) < _SLOW_SECONDS:
        yield degraded(
            "message-rate",
            f"{delays}. Pushpin before 1.40 does so if its message_rate is not 0: it holds events"
            " back while they arrive less than 25 ms apart.",
            "Set message_rate=0 in the section [handler] of pushpin.conf and restart Pushpin, or"
            " upgrade it.",
        )
    else:
        yield degraded(
            "slow",
            f"{delays}.",
            "Look which process is busy: the publisher, the proxy, the application, the database.",
        )


def _explain_resume(resumed: list[str]) -> Finding:
    if "missed" not in resumed:
        return broken(
            "not-resumed",
            "A client that comes back with Last-Event-ID does not get the event that it missed.",
            "A component between removes the header Last-Event-ID. Let it through (nginx:"
            " proxy_pass_request_headers on;).",
        )
    return broken(
        "resumed-wrongly",
        "A client that comes back with Last-Event-ID should get the event that it missed and a new"
        f" one, but it got {', '.join(resumed)}.",
        "Update the proxy, and the application and the publisher to the same version.",
    )
