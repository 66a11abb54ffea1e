"""Opens streams and continues them.

Only here `streams` and `grip` meet: it reads the events that a client missed, and then either
instructs the proxy to hold the stream, or streams from this process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import wraps
from math import inf
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIRequest
from django.db import connections
from django.http import (
    HttpRequest,
    HttpResponse,
    HttpResponseBadRequest,
    HttpResponseBase,
    JsonResponse,
)

from . import cors, doctor, instruments, liveness, sse
from .channelmanager import get_channelmanager
from .channels import DOCTOR, RESERVED, problem_of_name, reliable
from .conf import conf
from .errors import EventPermissionError, InvalidRequest, ResumeNotAllowed
from .grip import links, names, next_links, signature
from .grip.instruct import instruct
from .permission import check_permission
from .postgres.threads import run
from .rarely import Rarely
from .streams import direct, resumable
from .streams.replay import Page, is_recovery, parse_start, replay
from .users import primary_key, user_id

if TYPE_CHECKING:
    from django.contrib.auth.models import AbstractBaseUser

#: Makes the path of a stream's next link from its token.
LinkTo = Callable[[str], str]
_P = ParamSpec("_P")
_T = TypeVar("_T")

logger = logging.getLogger(__name__)
_rarely = Rarely()

_NO_PROXY = (
    "This request did not come through a GRIP proxy (Pushpin or Fanout), and without one this"
    " endpoint streams under ASGI only.\n"
    'In development: pip install daphne, add "daphne" as the first entry of INSTALLED_APPS, set'
    ' ASGI_APPLICATION = "myproject.asgi.application", and start manage.py runserver again.\n'
    "Otherwise run the application with an ASGI server (uvicorn, daphne), or send clients to the"
    " proxy's address. Then check that GRIP_URL contains the key with which the proxy signs its"
    " requests (sig_key in pushpin.conf), and that django_grip.GripMiddleware is in MIDDLEWARE.\n"
)
_PROXY_REQUIRED = (
    "This request did not come through a GRIP proxy (Pushpin or Fanout), which"
    " GRIP_PROXY_REQUIRED demands.\n"
    "Send clients to the proxy's address, and check that GRIP_URL contains the key with which the"
    " proxy signs its requests (sig_key in pushpin.conf). Or remove GRIP_PROXY_REQUIRED.\n"
)


def _set_headers(view: Callable[_P, HttpResponseBase]) -> Callable[_P, HttpResponseBase]:
    """Set the headers of every response of a view, whose first argument is the request."""

    @wraps(view)
    def with_headers(*args: _P.args, **kwargs: _P.kwargs) -> HttpResponseBase:
        request, response = args[0], view(*args, **kwargs)
        assert isinstance(request, HttpRequest)  # noqa: S101
        response["X-Accel-Buffering"] = "no"  # nginx would hold events back
        # So that no middleware compresses it. Django 5.2 would make each piece a separate gzip
        # file (middleware/gzip.py), of which browsers only show the first.
        response["Content-Encoding"] = "identity"
        cors.add_headers(request, response)
        return response

    return with_headers


@_set_headers
def open_stream(
    request: HttpRequest, view_kwargs: Mapping[str, Any], link_to: LinkTo
) -> HttpResponseBase:
    """Open a stream, or resume one with Last-Event-ID, for a view mounted at any path."""
    require_installed()
    conf.check_numbers()
    proxied = _came_through_proxy(request)
    if not proxied and not _can_stream_directly(request):
        return _refuse(request)
    problem = _check_publisher() if proxied else None
    try:
        session, check = _requested_session(request, view_kwargs)
        channels = session.channels
        resumable.check_head(request, channels, proxied)
        link = link_to(links.sign(session)) if proxied else None
        if link is not None:
            resumable.check_link(link, channels)
        after = parse_start(_requested_id(request), channels)
        description = _describe(request, session, link)
        if not proxied:
            check()
            return _stream(request, session, after, description)
        missed = _replay(
            request, {c: after.get(c) for c in reliable(channels)}, max_age=conf.replay_age
        )
        check()
    except ResumeNotAllowed as e:
        instruments.recoveries.labels("refused").inc()
        # Not a stream: only this status makes an EventSource stop reconnecting.
        return HttpResponseBadRequest(f"Invalid request: {e}.\n")
    except doctor.TokenRefused as e:
        return _error("bad-request", f"Invalid request: {e}.", {"doctor": e.reason})
    except InvalidRequest as e:
        _count_refusal(request)
        return _error("bad-request", f"Invalid request: {e}.")
    except EventPermissionError as e:
        _count_refusal(request)
        return _error("forbidden", str(e), {"channels": e.channels})
    instruments.count_page(
        recovering=is_recovery(after), reset=bool(missed.reset), missed=bool(missed.events)
    )
    if problem is not None:
        description += sse.encode_comment(problem)
    opening = description + sse.encode_open(sse.make_id(missed.start))
    body, ids = _encode(missed, session.user_id, _FIRST_BYTES)
    # The proxy asks the doctor's stream soon how it continues, so that this is tried, too.
    soon = session is _DOCTORS
    return _hold_or_continue(request, session, missed, opening + body, ids, link_to, soon)


def _requested_session(
    request: HttpRequest, view_kwargs: Mapping[str, Any]
) -> tuple[links.Session, Callable[[], None]]:
    """The requested stream, and a function that raises if its user may not read it."""
    token = request.GET.get(doctor.PARAMETER)
    if token is not None:
        doctor.check_token(token)
        return _DOCTORS, lambda: None
    channels = _requested_channels(request, view_kwargs)
    user = get_channelmanager().get_user_for_request(request)
    session = links.Session(channels, user_id(user))
    return session, lambda: check_permission(user, channels)


#: Only the doctor's token opens this session: no user asks for its channel.
_DOCTORS = links.Session((DOCTOR,), user_id(None))


def _check_permission_again(session: links.Session) -> None:
    """Raise `EventPermissionError` if the user may no longer read the stream."""
    if session.channels != _DOCTORS.channels:
        check_permission(_user_of_session(session), session.channels)


def _describe(request: HttpRequest, session: links.Session, link: str | None) -> str:
    """What the doctor is told before its stream begins. Nothing for all other streams."""
    if session is not _DOCTORS:
        return ""
    proxied = link is not None
    description = doctor.describe(
        proxied=proxied,
        table=_query(request, doctor.identify_table),
        next_link=link,
        unverified=None if proxied else signature.explain(request),
    )
    return doctor.encode(description)


def _check_publisher() -> str | None:
    """Log why no event will arrive. In development, return it, so that the stream says it, too."""
    if settings.DEBUG:
        return liveness.find_problem()
    liveness.check_publisher()
    return None


def _stream(
    request: HttpRequest, session: links.Session, after: Mapping[str, int], description: str
) -> HttpResponseBase:
    if request.method == "HEAD":
        return HttpResponse(content_type=sse.CONTENT_TYPE)

    def check() -> None:
        _check_permission_again(session)

    assert isinstance(request, ASGIRequest)  # noqa: S101  (see _can_stream_directly)
    return direct.stream(
        session.channels, after, session.user_id, check, request.scope, description
    )


@_set_headers
def continue_stream(request: HttpRequest, token: str, link_to: LinkTo) -> HttpResponseBase:
    """Tell the proxy how a stream continues. Ends it if the user may no longer read it."""
    next_links.mark_arrived(request)
    conf.check_numbers()
    if not _came_through_proxy(request):
        return _refuse(request)
    try:
        session = links.unsign(token)
        ids = session.cursor or links.last_ids(
            request.grip.last,  # type: ignore[attr-defined]
            reliable(session.channels),
        )
        missed = _replay(request, {c: ids.get(c) for c in reliable(session.channels)})
        # In this order, so that the page has no event that was sent after a revocation.
        _check_permission_again(session)
    except InvalidRequest as e:
        # The proxy drops the stream after a few tries, and the client reconnects with its own
        # credentials and the last id that it received.
        return HttpResponse(f"{e}.\n", status=403, content_type="text/plain")
    except EventPermissionError as e:
        instruments.revocations.inc()
        # Without a hold and a link the proxy ends the stream after this event.
        text = sse.encode_error("forbidden", str(e), {"channels": e.channels})
        instruct(request, session, ids)
        return HttpResponse(names.escape(text), content_type=sse.CONTENT_TYPE)
    instruments.count_page(recovering=False, reset=bool(missed.reset), missed=bool(missed.events))
    body, ids = _encode(missed, session.user_id)
    if session.channels == _DOCTORS.channels:
        body = doctor.CONTINUED + body
    paged = session.cursor is not None
    return _hold_or_continue(request, session, missed, body, ids, link_to, paged)


def _replay(
    request: HttpRequest, after: Mapping[str, int | None], max_age: timedelta | None = None
) -> Page:
    return _query(request, lambda: replay(after, max_age=max_age))


def _query(request: HttpRequest, function: Callable[[], _T]) -> _T:
    """Call a function that reads the database, on a connection that is already open.

    Under ASGI each request has a separate thread and therefore a separate connection. If nothing
    has opened it yet (a session, a transaction), opening it here would cost more than all the rest,
    and a thousand clients that reconnect at once would take a thousand connections.
    """
    if isinstance(request, ASGIRequest) and connections[conf.database].connection is None:
        return run(function)
    return function()


def require_installed() -> None:
    """Raise `ImproperlyConfigured` if the app is not installed, which no check can report."""
    if not apps.is_installed("pg_eventstream"):
        raise ImproperlyConfigured(
            'pg_eventstream is not installed as an app. Add "pgtrigger" and "pg_eventstream" to'
            " INSTALLED_APPS, and run python manage.py migrate."
        )


def can_stream(request: HttpRequest) -> bool:
    """Whether events arrive at this request's URL, through the proxy or from this process."""
    return _came_through_proxy(request) or _can_stream_directly(request)


def _refuse(request: HttpRequest) -> HttpResponseBase:
    """Refuse a request that cannot be streamed. Log it if no request can be."""
    if doctor.PARAMETER in request.GET and doctor.is_valid(request.GET[doctor.PARAMETER]):
        description = doctor.describe(proxied=False, unverified=signature.explain(request))
        return JsonResponse(description, status=501)
    text = _PROXY_REQUIRED if needs_proxy() else _NO_PROXY
    if not conf.grip_proxies and _rarely():
        logger.error(
            "Nothing can be streamed. %s",
            text.replace("\n", " ").strip(),
            extra={"event": "nothing-streamed"},
        )
    return HttpResponse(text, status=501, content_type="text/plain")


def _came_through_proxy(request: HttpRequest) -> bool:
    """Whether a configured proxy made the request, whose signature GripMiddleware verified."""
    grip = getattr(request, "grip", None)
    if grip is not None and grip.proxied:
        return True
    signature.warn_if_unverified(request)
    return False


def _can_stream_directly(request: HttpRequest) -> bool:
    """Whether this process can stream without a proxy, and is allowed to."""
    return isinstance(request, ASGIRequest) and not needs_proxy()


def needs_proxy() -> bool:
    """Whether the project admits clients only through its proxy."""
    return bool(getattr(settings, "GRIP_PROXY_REQUIRED", False))


def _requested_channels(request: HttpRequest, view_kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    asked = get_channelmanager().get_channels_for_request(request, view_kwargs)
    # Sorted, so that equal sessions get equal links.
    channels = tuple(sorted(set(asked)))
    if not channels:
        raise InvalidRequest("No channels specified")
    if len(channels) > conf.channel_limit:
        raise InvalidRequest(f"Channel limit exceeded ({len(channels)} > {conf.channel_limit})")
    for channel in channels:
        if problem_of_name(channel):
            raise InvalidRequest("A channel name is empty, too long or has a line break or NUL")
        if channel.startswith(RESERVED):
            raise InvalidRequest(f"Channel names that begin with {RESERVED!r} are reserved")
    return channels


def _requested_id(request: HttpRequest) -> str | None:
    """The id in the header, or else the last one in the query that is not empty."""
    candidates = [request.headers.get("Last-Event-ID", "")]
    candidates += reversed(request.GET.getlist("lastEventId"))
    return next((value for value in candidates if value.strip()), None)


def _count_refusal(request: HttpRequest) -> None:
    if (_requested_id(request) or "earliest").strip() != "earliest":
        instruments.recoveries.labels("refused").inc()


def _user_of_session(session: links.Session) -> AbstractBaseUser | None:
    """The user who opened the stream. The proxy's own requests carry no cookies."""
    key = primary_key(session.user_id)
    if key is None:
        return None
    user = get_channelmanager().get_user(key)
    if user is None:
        raise EventPermissionError(session.channels)
    return user


#: Pushpin accepts 100,000 bytes in the first response of a stream, and answers 502 to more
#: (src/proxy/proxysession.cpp, MAX_ACCEPT_RESPONSE_BODY). Escaping can double the size.
_FIRST_BYTES = 45_000


def _encode(missed: Page, reader: str, most_bytes: float = inf) -> tuple[str, dict[str, int]]:
    """Encode the missed events that fit into ``most_bytes``. Returns also the place after them."""
    parts: list[str] = []
    size, numbers = 0, missed.start
    if missed.reset:
        parts.append(sse.encode_reset(missed.reset, sse.make_id(missed.start)))
    for event, place in missed.visible_to(reader):
        part = event.encode(place.id)
        size += len(part.encode())
        if size > most_bytes:
            return "".join(parts), numbers
        parts.append(part)
        numbers = dict(place.numbers)
    return "".join(parts), missed.end


def _hold_or_continue(
    request: HttpRequest,
    session: links.Session,
    missed: Page,
    body: str,
    ids: dict[str, int],
    link_to: LinkTo,
    ask_soon: bool = False,
) -> HttpResponseBase:
    """Respond with the body, and have the proxy hold the stream or fetch the next page."""
    if request.method != "HEAD":  # there is nothing to hold open
        done = ids == missed.end and not missed.more
        follower = links.Session(session.channels, session.user_id, cursor=None if done else ids)
        link = link_to(links.sign(follower))
        instruct(request, session, ids, link=link, held=done, ask_soon=ask_soon)
    return HttpResponse(names.escape(body), content_type=sse.CONTENT_TYPE)


def _error(condition: str, text: str, extra: Mapping[str, Any] | None = None) -> HttpResponseBase:
    # Status 200, because otherwise an EventSource does not show the event to the page.
    body = sse.encode_error(condition, text, extra)
    return HttpResponse(body, content_type=sse.CONTENT_TYPE)
