"""The public names, and when they can be imported."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pg_eventstream
from pg_eventstream import NewEvent, asend_event, send_event

ROOT = Path(__file__).parents[2]


# The interface


def test_public_names_are_explained() -> None:
    for name in pg_eventstream.__all__:
        # Its own: not inherited, nor made of the fields by dataclass() or NamedTuple.
        text = getattr(pg_eventstream, name).__doc__
        assert text, name
        assert not text.startswith(f"{name}("), name


def test_no_other_name_is_public() -> None:
    found = {
        name
        for name, value in vars(pg_eventstream).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)  # submodules, which imports leave there
        and getattr(value, "__module__", "").startswith("pg_eventstream")
    }
    assert found == set(pg_eventstream.__all__)


def test_nothing_needs_the_extras() -> None:
    """OpenTelemetry in this case: without it, nothing is traced."""
    run_python(
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from pg_eventstream import tracing\n"
        "assert tracing.add_trace({'a': 1}) == {'a': 1} and tracing.add_trace(None) is None\n"
        "assert not tracing.is_on()\n"
        "with tracing.span('recover') as set_attributes: set_attributes({'a': 1})\n"
    )


def test_sending_synchronously_and_asynchronously_takes_the_same_arguments() -> None:
    names = ["channel", "event_type", "data", "skip_user_ids"]
    # As in django-eventstream, whose callers can pass async_publish by position.
    expected = [*names, "async_publish", "json_encode", "using", "meta"]
    for function in (send_event, asend_event):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == expected
        assert [p.default for p in parameters.values()][3:] == [None, True, True, None, None]
        assert parameters["meta"].kind is inspect.Parameter.KEYWORD_ONLY
    assert inspect.iscoroutinefunction(asend_event)
    # The fields of NewEvent are the arguments of send_event.
    assert list(NewEvent._fields) == [*names, "json_encode", "meta"]


def run_python(program: str, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_import_needs_no_settings() -> None:
    run_python("from pg_eventstream import send_event, send_events, asend_event, NewEvent")


def test_models_of_any_app_may_import_it(tmp_path: Path) -> None:
    app = tmp_path / "shop"
    app.mkdir()
    (app / "__init__.py").write_text("from pg_eventstream import send_event\n")
    (app / "models.py").write_text("from pg_eventstream import send_event\n")
    # Before pg_eventstream in INSTALLED_APPS, so that it is imported before the models.
    program = """
from django.conf import settings
settings.configure(INSTALLED_APPS=["shop", "pgtrigger", "pg_eventstream"])
import django
django.setup()
from shop.models import send_event
print(send_event.__module__)
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert run_python(program, PYTHONPATH=path) == "pg_eventstream.send\n"
