"""Pages for the browser with the package's static files, in addition to the streams."""

from __future__ import annotations

from pathlib import Path

KINDS = ["module", "classic"]
"""The two scripts of the browser client."""

_SCRIPTS = {
    "module": """\
<script type="module">
  import Default, * as exported from "/static/pg_eventstream/reconnecting-eventsource.mjs";
  Object.assign(window, exported, { Default });
</script>""",
    "classic": '<script src="/static/pg_eventstream/reconnecting-eventsource.js"></script>',
}


def html(kind: str) -> str:
    """A page that has loaded the client; `recorder.js` is there to use it."""
    recorder = Path(__file__).with_name("recorder.js").read_text(encoding="utf-8")
    return (
        '<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">'
        f"<title>{kind}</title>{_SCRIPTS[kind]}<script>{recorder}</script>"
    )
