"""The browser client without a window: in Node.js, in workers, in test runners."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.support.browser import Page
from tests.support.classic_script import CLASSIC, MODULE
from tests.support.programs import installed
from tests.support.scripted_server import Answer, ScriptedServer, answer


def node(code: str, *arguments: str) -> Any:
    """The value that a program passes to ``say``, after it has ended."""
    program = (
        f"const say = (what) => console.log(JSON.stringify(what));"
        f" const load = () => import({json.dumps(MODULE.as_uri())}); {code}"
    )
    done = subprocess.run(
        [installed("node"), "--input-type=module", "-e", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FOLLOW = """
    const events = [], states = [];
    const source = new ReconnectingEventSource(process.argv[1], { max_retry_time: 10 });
    source.onmessage = ({ data, lastEventId, origin }) => events.push([data, lastEventId, origin]);
    source.onopen = () => states.push("open");
    source.onerror = () => {
        states.push(source.readyState);
        if (source.readyState === ReconnectingEventSource.CLOSED) say({ events, states });
    };
"""
LOADED = {
    "module": "const { ReconnectingEventSource } = await load();",
    # As scripts run: in the global scope.
    "classic": (
        "const { readFileSync } = await import('node:fs'); const vm = await import('node:vm');"
        f" vm.runInThisContext(readFileSync({json.dumps(str(CLASSIC))}, 'utf8'));"
        " const { ReconnectingEventSource } = globalThis;"
    ),
}


@pytest.mark.parametrize("kind", LOADED)
def test_stream_is_followed_to_its_end(kind: str) -> None:
    answers = [
        answer("id: a:1\ndata: 1\n\n"),
        Answer(status=503),
        answer("id: a:2\ndata: 2\n\n"),
        Answer(status=401),
    ]
    with ScriptedServer(*answers) as server:
        got = node(LOADED[kind] + FOLLOW, f"{server.url}/events/?x=1")
        assert [request.target for request in server.requests] == [
            "/events/?x=1",
            "/events/?x=1&lastEventId=a%3A1",
            "/events/?x=1&lastEventId=a%3A1",
            "/events/?x=1&lastEventId=a%3A2",
        ]
    assert got["events"] == [["1", "a:1", server.url], ["2", "a:2", server.url]]
    assert got["states"] == ["open", 0, 0, "open", 0, 2]


def test_closed_source_keeps_no_program_alive() -> None:
    code = """
        const source = new ReconnectingEventSource(process.argv[1]);
        source.onmessage = () => { source.close(); say(source.readyState); };
    """
    with ScriptedServer(answer("data: 1\n\n", hold=True)) as server:
        assert node(LOADED["module"] + code, f"{server.url}/events/") == 2


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("/events/", "not an absolute URL, and there is no page"),
        ("//example.com/", "not an absolute URL"),
        ("", "not an absolute URL"),
        ("http://:0:0/", "not an absolute URL"),
    ],
)
def test_relative_url_without_a_page_is_refused_with_the_reason(url: str, says: str) -> None:
    code = """
        try { new ReconnectingEventSource(process.argv[1]); }
        catch (error) { say([error instanceof TypeError, error.message]); }
    """
    is_type_error, message = node(LOADED["module"] + code, url)
    assert is_type_error
    assert says in message


def test_relative_url_is_completed_by_what_there_is_of_a_page() -> None:
    """As in test runners: a location, a document that is not real, no events of a window."""
    code = (
        """
        globalThis.location = { href: process.argv[1] };
        globalThis.document = {};
    """
        + LOADED["module"]
        + """
        const source = new ReconnectingEventSource("../events/");
        source.onmessage = () => { source.close(); say(source.url); };
    """
    )
    with ScriptedServer(answer("data: 1\n\n", hold=True)) as server:
        assert node(code, f"{server.url}/rooms/1") == f"{server.url}/events/"


@pytest.mark.parametrize(
    "name", ["fetch", "EventTarget", "Event", "MessageEvent", "AbortController", "Headers"]
)
def test_environment_that_lacks_something_is_told_what(name: str) -> None:
    code = """
        const name = process.argv[1];
        void [Headers, MessageEvent]; // which Node.js makes of the others when they are needed
        Object.defineProperty(globalThis, name, { value: undefined });
        const { ReconnectingEventSource, EventSourceNotAvailableError } = await load();
        try { new ReconnectingEventSource("http://127.0.0.1:1/"); }
        catch (error) {
            say([error instanceof EventSourceNotAvailableError, error.message]);
        }
    """
    is_ours, message = node(code, name)
    assert is_ours
    assert f"needs {name}, which this environment does not have" in message


def test_answer_without_an_address_is_read_too() -> None:
    """As with a fetch() that a test replaces by its own responses."""
    code = (
        LOADED["module"]
        + """
        globalThis.fetch = async () => new Response("data: 1\\n\\n", {
            headers: { "Content-Type": "text/event-stream" },
        });
        const source = new ReconnectingEventSource("https://app.example/events/");
        source.onmessage = ({ data, origin }) => { source.close(); say([data, origin]); };
    """
    )
    assert node(code) == ["1", "https://app.example"]


def test_worker_follows_streams(page: Page) -> None:
    with ScriptedServer(answer("data: 1\n\n", hold=True)) as server:
        page.goto(f"{server.url}/pages/module/")
        code = """
            importScripts(`${ORIGIN}/static/pg_eventstream/reconnecting-eventsource.js`);
            let refusal;
            try { new ReconnectingEventSource("/events/"); }
            catch (error) { refusal = `${error}`; } // of a worker without an address
            const source = new ReconnectingEventSource(`${ORIGIN}/events/`);
            source.onmessage = ({ data, origin }) => postMessage([data, origin, refusal]);
        """
        page.evaluate(
            """(code) => {
                const text = `const ORIGIN = ${JSON.stringify(location.origin)}; ${code}`;
                const blob = new Blob([text], { type: "text/javascript" });
                new Worker(URL.createObjectURL(blob)).onmessage = ({ data }) => {
                    window.fromWorker = data;
                };
            }""",
            code,
        )
        page.wait_for("window.fromWorker")
        data, origin, refusal = page.evaluate("fromWorker")
        assert (data, origin) == ("1", server.url)
        assert refusal.startswith("TypeError: /events/ is not a valid URL (relative to blob:")
