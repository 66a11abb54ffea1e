"""Signatures and links are valid for one purpose and for one holder only."""

from __future__ import annotations

import hmac
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jwt
import pytest
from django.conf import settings
from django.contrib.sessions.backends.signed_cookies import SessionStore
from django.core import signing
from django.test import Client, override_settings
from django.utils.crypto import constant_time_compare

from pg_eventstream.conf import conf
from pg_eventstream.errors import InvalidRequest
from pg_eventstream.grip import links
from pg_eventstream.grip.proxy import Proxy, Unavailable
from tests.support.database import Database
from tests.support.environment import KEY
from tests.support.origin import behind_a_proxy, signature

SESSION = links.Session(("c",), "7")
SESSION_COOKIES = "django.contrib.sessions.backends.signed_cookies"


@pytest.fixture(autouse=True)
def proxied(database: Database) -> Iterator[None]:
    with behind_a_proxy:
        yield


# The proxy's signature. (Those of Fastly, with a public key: test_fanout.py.)


def in_base64(data: bytes) -> str:
    return jwt.utils.base64url_encode(data).decode()


def sealed(header: Any, claims: Any, key: str = KEY, digest: str = "sha256") -> str:
    """A token with any content, signed like HS256 tokens. PyJWT would refuse to make it."""
    head, body = (
        in_base64(part if isinstance(part, bytes) else json.dumps(part).encode())
        for part in (header, claims)
    )
    seal = hmac.new(key.encode(), f"{head}.{body}".encode(), digest).digest()
    return f"{head}.{body}.{in_base64(seal)}"


def good() -> dict[str, Any]:
    return {"iss": "pushpin", "exp": int(time.time()) + 60}


HS256 = {"alg": "HS256", "typ": "JWT"}
FORGERIES: dict[str, Callable[[], str]] = {
    "no algorithm": lambda: sealed({"alg": "none"}, good()).rpartition(".")[0] + ".",
    "NONE, with a seal": lambda: sealed({"alg": "NONE"}, good()),
    "another algorithm of the same key": lambda: sealed({"alg": "HS512"}, good(), digest="sha512"),
    "an algorithm of public keys": lambda: sealed({"alg": "RS256"}, good()),
    "a key of its own": lambda: sealed({**HS256, "jwk": {"kty": "oct", "k": "eA"}}, good(), "x"),
    "a file as key": lambda: sealed({**HS256, "kid": "/dev/null"}, good(), ""),
    "a header that must be understood": lambda: sealed({**HS256, "crit": ["x"], "x": 1}, good()),
    "a payload that is not encoded": lambda: sealed(
        {**HS256, "crit": ["b64"], "b64": False}, good()
    ),
    "no end": lambda: sealed(HS256, {"iss": "pushpin"}),
    "an end of null": lambda: sealed(HS256, {"exp": None}),
    "an end in words": lambda: sealed(HS256, {"exp": "tomorrow"}),
    "an end without end": lambda: sealed(HS256, {"exp": math.inf}),
    "an end that is no number": lambda: sealed(HS256, {"exp": math.nan}),
    "an end of true": lambda: sealed(HS256, {"exp": True}),
    "an end in the past": lambda: sealed(HS256, {"exp": int(time.time()) - 1}),
    "a beginning in the future": lambda: sealed(HS256, {**good(), "nbf": time.time() + 600}),
    "a list of claims": lambda: sealed(HS256, [good()]),
    "claims that are no JSON": lambda: sealed(HS256, b"{"),
    "claims nested without end": lambda: sealed(HS256, b"[" * 100_000),
    "a header nested without end": lambda: sealed(b"[" * 100_000, good()),
    "ten megabytes": lambda: signature() + "x" * 10_000_000,
    "megabytes of dots": lambda: "." * 1_000_000,
    "another key": lambda: sealed(HS256, good(), secrets.token_hex(24)),
    "an empty key": lambda: sealed(HS256, good(), ""),
    "the application's key": lambda: sealed(HS256, good(), settings.SECRET_KEY),
    "the key itself": lambda: KEY,
    "a link": lambda: links.sign(SESSION),
    "a signed value": lambda: signing.dumps(good(), key=KEY),
}


def test_request_with_a_forged_signature_gets_nothing_of_a_proxys() -> None:
    last = {"Grip-Last": "events-c; last-id=0"}
    link = f"/events/{links.NEXT}{links.sign(links.Session(('c',), 'anonymous'))}"
    assert Client().get(link, headers={"Grip-Sig": sealed(HS256, good()), **last})["Grip-Hold"]
    for name, forged in FORGERIES.items():
        for path in ("/events/?channel=c", link):
            response = Client().get(path, headers={"Grip-Sig": forged(), **last})
            assert response.status_code == 501, name
            assert not any(header.startswith("Grip-") for header in response.headers), name


def test_signature_of_another_issuer_counts_if_and_only_if_no_issuer_is_configured() -> None:
    for url, status in (("", 200), ("&verify-iss=other", 501), ("&verify-iss=pushpin", 200)):
        with override_settings(GRIP_URL=f"http://127.0.0.1:1?key={KEY}{url}"):
            headers = {"Grip-Sig": signature()}
            assert Client().get("/events/?channel=c", headers=headers).status_code == status


# Links


def test_nothing_else_that_the_application_signs_is_a_link() -> None:
    content = {"c": ["c"], "u": "7", "x": 10**9}
    store = SessionStore()
    store.update(content)
    salts = ["", "pg_eventstream", "next-link", "pg_eventstream.hold", SESSION_COOKIES, "sessionid"]
    tokens = [
        *(signing.dumps(content, salt=salt) for salt in salts),
        *(signing.Signer(salt=salt).sign_object(content) for salt in salts),
        *(signing.TimestampSigner(salt=salt).sign_object(content) for salt in salts),
        signing.get_cookie_signer(salt="sessionid").sign(signing.b64_encode(b"{}").decode()),
        str(store._get_session_key()),
        sealed(HS256, {**content, **good()}, settings.SECRET_KEY),
        sealed(HS256, {**content, **good()}),
        signature(),
    ]
    for token in tokens:
        with pytest.raises(InvalidRequest):
            links.unsign(token)


def test_link_is_nothing_else_that_the_application_signs() -> None:
    token = links.sign(SESSION)
    assert links.unsign(token) == SESSION
    for salt in ("", "pg_eventstream", SESSION_COOKIES, "django.core.signing", "sessionid"):
        for signer in (signing.Signer(salt=salt), signing.TimestampSigner(salt=salt)):
            with pytest.raises(signing.BadSignature):
                signer.unsign_object(token)
        with pytest.raises(signing.BadSignature):
            signing.loads(token, salt=salt)
    assert SessionStore(session_key=token).load() == {}
    with pytest.raises(jwt.PyJWTError):
        jwt.decode(token, settings.SECRET_KEY, algorithms=["HS256"])


@pytest.mark.parametrize(
    ("cursor", "works", "refused"),
    [(None, 24 * 3600, 25 * 3600), ({"c": 0}, 3600, 2 * 3600)],
    ids=["of a stream that is held", "of the next page"],
)
def test_link_works_for_as_long_as_the_proxy_needs_it(
    cursor: dict[str, int] | None, works: int, refused: int
) -> None:
    """The proxy requests the next link right after a page, and needs to send no secret."""
    hour = time.time() // 3600 * 3600
    with mock.patch("pg_eventstream.grip.links.time") as clock:
        clock.time.return_value = hour
        token = links.sign(links.Session(("c",), "7", cursor))
        clock.time.return_value = hour + works
        links.unsign(token)
        clock.time.return_value = hour + refused
        with pytest.raises(InvalidRequest, match="expired"):
            links.unsign(token)


# Time


def test_seals_are_compared_in_constant_time() -> None:
    """By the functions made for it, no matter how much of a signature is correct."""
    token = links.sign(SESSION)
    with mock.patch(
        "django.core.signing.constant_time_compare", wraps=constant_time_compare
    ) as compare:
        links.unsign(token)
        with pytest.raises(InvalidRequest):
            links.unsign(token[:-1])
    assert compare.call_count == 2

    headers = {"Grip-Sig": signature()}
    with mock.patch("hmac.compare_digest", wraps=hmac.compare_digest) as compare:
        assert Client().get("/events/?channel=c", headers=headers).status_code == 200
        headers["Grip-Sig"] = sealed(HS256, good(), "another key")
        assert Client().get("/events/?channel=c", headers=headers).status_code == 501
    assert compare.call_count >= 2  # and once for the log


# Logs


def test_proxy_is_named_without_what_is_secret_about_it() -> None:
    """In logs, in errors and in the table of proxies."""
    url = f"http://user:{KEY}@127.0.0.1:1/realm/?iss=realm&key={KEY}&token={KEY}"
    with override_settings(GRIP_URL=url):
        (config,) = conf.grip_proxies
        proxy = Proxy(config)
    assert proxy.name == "http://127.0.0.1:1/realm"
    with pytest.raises(Unavailable) as raised:
        proxy.post(b"{}")
    assert KEY not in str(raised.value)
