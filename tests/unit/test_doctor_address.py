"""Where the doctor looks for the endpoint if no URL is given."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from pg_eventstream.operate.doctor.address import check_url, find_url
from pg_eventstream.operate.doctor.client import with_parameter
from pg_eventstream.views import events

PUSHPIN = {"GRIP_URL": "http://localhost:5561?key=k"}


@pytest.mark.parametrize(
    ("configured", "url"),
    [
        ({}, "http://127.0.0.1:8000/events/"),
        (PUSHPIN, "http://localhost:7999/events/"),
        ({"GRIP_URL": "http://10.0.0.7:5561/x?key=k"}, "http://10.0.0.7:7999/events/"),
        ({"GRIP_URL": "http://[::1]:5561?key=k"}, "http://[::1]:7999/events/"),
        ({"ROOT_URLCONF": "tests.project.i18n_urls", **PUSHPIN}, "http://localhost:7999/"),
    ],
)
def test_url_is_that_of_the_urlconf_at_the_usual_port(configured: dict[str, Any], url: str) -> None:
    with override_settings(**configured):
        found, remark = find_url(events)
    assert found.startswith(url)
    assert "--through" in remark
    assert len(f"Through {found}{remark}") < 140


def test_url_must_be_given_if_the_urlconf_has_no_path_without_parameters() -> None:
    with (
        override_settings(ROOT_URLCONF="tests.project.no_urls"),
        pytest.raises(ImproperlyConfigured, match="--through https"),
    ):
        find_url(events)


@pytest.mark.parametrize(
    "url", ["", "events/", "/events/", "ftp://a/", "http:///x", "https://[::1/", "http://a:b/"]
)
def test_url_without_a_host_is_refused(url: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="full URL"):
        check_url(url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://a/events/", "http://a/events/?x=1"),
        ("http://a/events/?channel=b", "http://a/events/?channel=b&x=1"),
        ("http://a/events/?#top", "http://a/events/?x=1"),
    ],
)
def test_token_is_added_to_the_query(url: str, expected: str) -> None:
    assert with_parameter(url, "x=1") == expected
