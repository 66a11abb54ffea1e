"""The endpoint: opens streams, resumes them, and answers the proxy's questions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf
from typing import Any
from urllib.parse import quote

from django.contrib.auth import get_user_model
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest, HttpResponseBase
from django.utils.http import escape_leading_slashes
from django.views.decorators.http import require_safe

from . import hold, sse
from .channelmanager import get_channelmanager
from .conf import conf
from .errors import ChannelsForbidden, InvalidRequest, ResumeNotAllowed
from .recovery import Recovered, recover

_NO_PROXY = (
    "This endpoint streams through a GRIP proxy (Pushpin or Fanout), and this request did not"
    " come through one.\n"
    "Send clients to the proxy's address, and check that GRIP_URL holds the key that the proxy"
    " signs its requests with (sig_key in pushpin.conf).\n"
)
# No event can have them in its channel; surrogates stand for bytes that are no text.
_IMPOSSIBLE = re.compile("[\r\n\0\ud800-\udfff]")


@require_safe
def events(request: HttpRequest, **kwargs: Any) -> HttpResponseBase:
    """Open a stream, or resume one with Last-Event-ID."""
    if not _came_through_proxy(request):
        return _finish(HttpResponse(_NO_PROXY, status=501, content_type="text/plain"))
    try:
        session = _requested_session(request, kwargs)
        ids = _requested_ids(request)
        _check_permission(_user_of_request(request), session.channels)
        missed = recover({channel: ids.get(channel) for channel in session.channels})
    except ResumeNotAllowed as e:
        # Not a stream: this status is what makes an EventSource stop trying.
        return _finish(HttpResponseBadRequest(f"Invalid request: {e}.\n"))
    except InvalidRequest as e:
        return _error("bad-request", f"Invalid request: {e}.")
    except ChannelsForbidden as e:
        return _error("forbidden", str(e), {"channels": e.channels})
    opening = sse.encode_open(sse.make_id(missed.start))
    body, ids = _encode(missed, session.user_id, _FIRST_BYTES)
    return _go_on(request, session, missed, opening + body, ids)


@require_safe
def next_link(request: HttpRequest, token: str, **kwargs: Any) -> HttpResponseBase:
    """Tell the proxy how a stream goes on. Ends it if the user may not read it any more."""
    if not _came_through_proxy(request):
        return _finish(HttpResponse(_NO_PROXY, status=501, content_type="text/plain"))
    try:
        session = hold.unsign(token)
        ids = session.cursor or hold.last_ids(
            request.grip.last,  # type: ignore[attr-defined]
            session.channels,
        )
        _check_permission(_user_of_session(session), session.channels)
        missed = recover({channel: ids.get(channel) for channel in session.channels})
    except InvalidRequest as e:
        # The proxy drops the stream after a few tries, and the client comes back with
        # its own credentials and the id that it saw last.
        return _finish(HttpResponse(f"{e}.\n", status=403, content_type="text/plain"))
    except ChannelsForbidden as e:
        # Without a hold and a link the proxy ends the stream, behind this event.
        text = sse.encode_error("forbidden", str(e), {"channels": e.channels})
        hold.instruct(request, session, ids)
        return _finish(HttpResponse(hold.escape(text), content_type=sse.CONTENT_TYPE))
    body, ids = _encode(missed, session.user_id)
    return _go_on(request, session, missed, body, ids, token=token)


def _came_through_proxy(request: HttpRequest) -> bool:
    """Whether a proxy of ours made the request; GripMiddleware has verified its signature."""
    grip = getattr(request, "grip", None)
    return grip is not None and grip.proxied


def _requested_session(request: HttpRequest, view_kwargs: Mapping[str, Any]) -> hold.Session:
    asked = get_channelmanager().get_channels_for_request(request, view_kwargs)
    # In one order, so that equal sessions get equal links.
    channels = tuple(sorted(set(asked)))
    if not channels:
        raise InvalidRequest("No channels specified")
    if len(channels) > conf.channel_limit:
        raise InvalidRequest(f"Channel limit exceeded ({len(channels)} > {conf.channel_limit})")
    for channel in channels:
        if not channel or len(channel) > 255 or _IMPOSSIBLE.search(channel):
            raise InvalidRequest("A channel name is empty, too long or has a line break or NUL")
    user = _user_of_request(request)
    return hold.Session(channels, None if user is None else str(user.pk))


def _requested_ids(request: HttpRequest) -> dict[str, int]:
    """From the header, else from the query: the last one that is not empty."""
    candidates = [request.headers.get("Last-Event-ID", "")]
    candidates += reversed(request.GET.getlist("lastEventId"))
    last_event_id = next((value for value in candidates if value.strip()), None)
    return {} if last_event_id is None else sse.parse_id(last_event_id)


def _user_of_request(request: HttpRequest) -> Any:
    user = getattr(request, "user", None)
    return user if user is not None and user.is_authenticated else None


def _user_of_session(session: hold.Session) -> Any:
    """The user that opened the stream; the proxy's requests carry no cookies."""
    if session.user_id is None:
        return None
    model = get_user_model()
    try:
        user = model._default_manager.get(pk=session.user_id)
    except model.DoesNotExist as e:
        raise ChannelsForbidden(session.channels) from e
    if not user.is_active:
        raise ChannelsForbidden(session.channels)
    return user


def _check_permission(user: Any, channels: tuple[str, ...]) -> None:
    manager = get_channelmanager()
    refused = [channel for channel in channels if not manager.can_read_channel(user, channel)]
    if refused:
        raise ChannelsForbidden(refused)


#: Pushpin takes 100,000 bytes in the first response of a stream, and answers 502 to more
#: (src/proxy/proxysession.cpp, MAX_ACCEPT_RESPONSE_BODY); escaping may double them.
_FIRST_BYTES = 45_000


def _encode(
    missed: Recovered, user_id: str | None, most_bytes: float = inf
) -> tuple[str, dict[str, int]]:
    """The missed events that fit into so many bytes, and the ids behind the last of them."""
    ids = dict(missed.start)
    parts: list[str] = []
    size = 0
    if missed.reset:
        parts.append(sse.encode_reset(missed.reset, sse.make_id(ids)))
    for event in missed.events:
        ids_behind = {**ids, event.channel: event.eid}
        if (user_id or hold.ANONYMOUS) not in event.skip_user_ids:
            part = sse.encode_event(event.type, event.data, sse.make_id(ids_behind))
            size += len(part.encode())
            if size > most_bytes:
                break
            parts.append(part)
        ids = ids_behind
    return "".join(parts), ids


def _go_on(
    request: HttpRequest,
    session: hold.Session,
    missed: Recovered,
    body: str,
    ids: dict[str, int],
    token: str | None = None,
) -> HttpResponse:
    """Send the body, then hold the stream; or fetch the next page if there are more events."""
    if request.method != "HEAD":  # which has nothing to hold open
        done = ids == missed.end and not missed.more
        follower = hold.Session(session.channels, session.user_id, cursor=None if done else ids)
        link = f"{_base_path(request, token)}{hold.NEXT}{hold.sign(follower)}"
        hold.instruct(request, session, ids, link=link, held=done)
    return _finish(HttpResponse(hold.escape(body), content_type=sse.CONTENT_TYPE))


def _base_path(request: HttpRequest, token: str | None) -> str:
    """Where the endpoint is mounted, as it stands in a URL and in a header.

    A path that began with two slashes would name a host, to which the proxy would turn.
    """
    path = request.path if token is None else request.path.removesuffix(f"{hold.NEXT}{token}")
    return escape_leading_slashes(quote(path))


def _error(condition: str, text: str, extra: Mapping[str, Any] | None = None) -> HttpResponseBase:
    # Status 200: only then does an EventSource show the event to the page.
    return _finish(
        HttpResponse(sse.encode_error(condition, text, extra), content_type=sse.CONTENT_TYPE)
    )


def _finish(response: HttpResponse) -> HttpResponse:
    response["Cache-Control"] = "no-cache, no-transform"
    response["X-Accel-Buffering"] = "no"  # nginx would hold events back
    return response
