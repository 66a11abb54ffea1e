"""Where a project can mount the endpoint, and which channels the URLconf selects."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from django.test import override_settings

from tests.support.database import Database
from tests.support.origin import Origin, behind_a_proxy, signature


@pytest.fixture(autouse=True)
def mounted(database: Database) -> Iterator[None]:
    with behind_a_proxy, override_settings(ROOT_URLCONF="tests.project.url_forms"):
        yield


@pytest.fixture
def origin() -> Origin:
    return Origin()


@pytest.mark.parametrize(
    ("path", "channels"),
    [
        ("/events/?channel=b&channel=a", ["a", "b"]),
        ("/module/?channel=b", ["b"]),
        ("/no-slash?channel=b", ["b"]),
        ("/fixed/?channel=b", ["one", "two"]),
        ("/channel/x/?channel=b", ["x"]),
        ("/rooms/x/?channel=b", ["all", "x"]),
        ("/objects/book/7/?channel=b", ["book-7"]),
        ("/rooms/a%20b%2Cc;d%22%3E%25%7B0%7D/", ["a b,c;d\">%{0}", "all"]),
        ("/rooms/%E5%A5%BD%F0%9F%8E%89/", ["all", "好🎉"]),
        ("/rooms/%25FF/", ["%FF", "all"]),
        ("/deep/a/b/c/events/", ["deep"]),
        ("/open/a/b/c/", ["open"]),
    ],
)  # fmt: skip
def test_mounted_in_every_form_it_opens_the_streams_and_follows_its_links(
    origin: Origin, path: str, channels: list[str]
) -> None:
    opened = origin.ask(path)
    assert opened.held
    assert sorted(opened.opened_at) == sorted(channels)
    assert re.fullmatch(r"[\w/%.~:-]+", opened.next_link, re.ASCII)
    following = origin.follow(opened)
    assert following.held
    assert following.next_link == opened.next_link
    assert following.response["Grip-Channel"] == opened.response["Grip-Channel"]


def test_links_keep_the_prefix_that_the_server_took_off(origin: Origin) -> None:
    response = origin.get(
        "/events/?channel=a", SCRIPT_NAME="/app", headers={"Grip-Sig": signature()}
    )
    assert response["Grip-Link"].startswith("</app/events/next-")


def test_link_never_leads_to_another_host(origin: Origin) -> None:
    for path in ("//evil.example/", "///evil.example/x/"):
        link = origin.ask(f"http://testserver{path}").next_link
        assert link.startswith("/")
        assert not link.startswith("//")
