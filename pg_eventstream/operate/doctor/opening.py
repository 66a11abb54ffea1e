"""Finds out why a stream did not open, or did not open as it should."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from django.conf import settings

from ...conf import conf
from ..findings import Finding
from .client import Answer, Trouble
from .measured import Measured


def broken(code: str, message: str, remedy: str) -> Finding:
    return Finding(code=code, level="broken", message=message, remedy=remedy)


def degraded(code: str, message: str, remedy: str) -> Finding:
    return Finding(code=code, level="degraded", message=message, remedy=remedy)


def find(measured: Measured) -> Iterator[Finding]:
    """What the response to the request for a stream shows."""
    answer = measured.answer
    if measured.trouble is not None:
        yield _explain_trouble(measured.url, measured.trouble)
    elif answer is not None and not answer.is_stream:
        yield _explain_answer(measured, answer)
    elif answer is not None:
        yield from _explain_stream(measured, answer)


def _explain_trouble(url: str, trouble: Trouble) -> Finding:
    message, remedy = TROUBLES[trouble.kind]
    where = urlsplit(url).netloc
    return broken(trouble.kind, f"{message.format(where=where)}: {trouble.message}.", remedy)


#: For each kind of `Trouble`, what is wrong and what to do.
TROUBLES = {
    "not-reachable": (
        "Nothing accepts connections at {where}",
        "Start the server there (for Pushpin: systemctl start pushpin), or give the URL at which"
        " clients open streams: --through URL.",
    ),
    "unknown-host": (
        "The host in {where} is not known",
        "Correct the URL of --through, or the DNS record.",
    ),
    "tls-error": (
        "There is no secure connection to {where}",
        "Renew or complete the certificate there. If the server has none, use http:// in"
        " --through.",
    ),
    "no-answer": (
        "The server at {where} does not answer",
        "Look whether the server hangs, whether the application has free workers, and whether a"
        " firewall drops the packets.",
    ),
    "connection-lost": (
        "The connection to {where} ended without an answer",
        "Compare the scheme and the port of --through with those of the server, and look into its"
        " log.",
    ),
}


def _explain_answer(measured: Measured, answer: Answer) -> Finding:
    url, status = measured.url, answer.status
    server = answer.headers.get("server", "")
    who = f"{url} answers {status}" + (f" (Server: {server})" if server else "")
    if 300 <= status < 400:
        return _explain_redirect(url, who, answer.headers.get("location", ""))
    if status in (401, 403, 429):
        return broken(
            "access-refused",
            f"{who}: something refuses the request before it reaches the endpoint. It says:"
            f" {_excerpt(answer.body)}",
            "Let the doctor in as you let clients in, for example --header 'Authorization: …' or"
            " --header 'Cookie: sessionid=…', and clients' requests as well.",
        )
    if status in (404, 405, 410) or status == 200:
        what = answer.headers.get("content-type", "no content type")
        return broken(
            "wrong-url",
            f"{who} with {what}. This is not the URL of an endpoint.",
            "Give the URL at which clients open streams: --through URL. The URLconf mounts the"
            ' endpoint with path("events/", include("pg_eventstream.urls")).',
        )
    if status == 501 and "unverified" in (measured.description or {}):
        return _explain_unverified(measured) or _no_proxy(url)
    if status in (502, 503, 504):
        return broken(
            "bad-gateway",
            f"{who}: a proxy there cannot reach the server behind it. It says:"
            f" {_excerpt(answer.body)}",
            "Start the application, and compare its address with the one in the proxy's"
            " configuration (Pushpin: /etc/pushpin/routes; nginx: proxy_pass).",
        )
    return broken(
        "server-error",
        f"{who} instead of a stream. It says: {_excerpt(answer.body)}",
        "The log of the application has the reason.",
    )


def _explain_redirect(url: str, who: str, location: str) -> Finding:
    here, there = urlsplit(url), urlsplit(location)
    if there.scheme == "https" and here.scheme == "http" and there.path == here.path:
        remedy = (
            "Give the https:// URL that clients use: --through URL. If TLS ends before the"
            ' application, set SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") and'
            " let the server in front send that header, or switch SECURE_SSL_REDIRECT off."
        )
    elif there.path.rstrip("/") == here.path.rstrip("/"):
        remedy = f"Use the URL to which it redirects: --through {location.partition('?')[0]}"
    else:
        remedy = (
            "A middleware of the site demands a login, or redirects for another reason. Pass the"
            " cookie of a session: --header 'Cookie: sessionid=…'. If visitors should read streams"
            " without a login, exempt the view pg_eventstream-events from that middleware."
        )
    return broken(
        "redirected",
        f"{who} and redirects to {location.partition('?')[0]}. An EventSource follows it, and"
        " finds no stream there.",
        remedy,
    )


def _explain_stream(measured: Measured, answer: Answer) -> Iterator[Finding]:
    if measured.error is not None:
        yield _explain_error(measured)
        return
    encoding = answer.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        yield degraded(
            "compressed",
            f"The stream is compressed ({encoding}) on the way. Servers that compress can hold"
            " events back until there is enough to compress.",
            "Switch compression off for the path of the endpoint: in nginx, gzip off; in its"
            " location, or leave text/event-stream out of gzip_types.",
        )
    if measured.description is None and measured.opened is None:
        if measured.was_held_back or not measured.was_closed:
            yield held_back("a stream opens, but nothing of it arrives")
        else:
            yield broken(
                "stream-closed",
                "The response is an event stream, but it ends at once.",
                "The log of the application has the reason.",
            )
        return
    if measured.description is None:
        yield _older(measured)
        return
    if measured.was_held_back and measured.opened is None:
        yield held_back("a stream's first event arrives only when others push it out")
    if not measured.is_proxied and (unverified := _explain_unverified(measured)):
        yield unverified


def _explain_error(measured: Measured) -> Finding:
    error = measured.error or {}
    if error.get("doctor") == "key":
        return broken(
            "secret-key-differs",
            "The application does not accept the token of this command, because their SECRET_KEY"
            " differs. Processes with different keys do not accept each other's next links either.",
            "Set the same SECRET_KEY (or SECRET_KEY_FALLBACKS) for all processes of the"
            " application and for this command.",
        )
    if error.get("doctor") == "clock":
        return broken(
            "clocks-differ",
            f"The application does not accept the token of this command: {error.get('text')}",
            "Let NTP set the clocks of both machines (timedatectl set-ntp true).",
        )
    return _older(measured)


def _older(measured: Measured) -> Finding:
    text = (measured.error or {}).get("text")
    return broken(
        "doctor-unknown",
        "The endpoint does not know the doctor"
        + (f" (it says: {text})" if text else "")
        + ": the application runs an older version of pg_eventstream, or something removes the"
        " query of the request.",
        "Restart the application with the version that is installed here, and let servers in front"
        " pass the query on.",
    )


def _explain_unverified(measured: Measured) -> Finding | None:
    if measured.unverified is None:
        return None
    code, reason, remedy = measured.unverified
    return broken(
        code,
        f"The request came through a GRIP proxy, but its signature does not count: {reason}. So the"
        " application does not use the proxy: under ASGI it streams directly, and under WSGI it"
        " answers 501.",
        remedy,
    )


def _no_proxy(url: str) -> Finding:
    if getattr(settings, "GRIP_PROXY_REQUIRED", False):
        why = "GRIP_PROXY_REQUIRED allows no other way"
    else:
        why = "under WSGI the application cannot stream directly"
    to_proxy = "the proxy's address" if conf.grip_proxies else "a proxy, and set GRIP_URL"
    return broken(
        "no-proxy",
        f"The request to {url} did not come through a GRIP proxy, and {why}.",
        f"Send clients to {to_proxy} (sig_key in pushpin.conf makes it sign requests), or run the"
        " application with an ASGI server.",
    )


def held_back(what: str, late: bool = False) -> Finding:
    """The finding for a server on the way that collects data."""
    return Finding(
        code="buffered",
        level="degraded" if late else "broken",
        message=f"A server on the way holds events back: {what}.",
        remedy="Switch buffering off for the path of the endpoint: in nginx, proxy_buffering off;"
        " and proxy_http_version 1.1; in its location. Check CDNs and virus scanners as well.",
    )


def _excerpt(body: str) -> str:
    text = " ".join(re.sub(r"<[^>]*>", " ", body).split())
    return repr(text[:120]) if text else "nothing"
