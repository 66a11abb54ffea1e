"""The reference names everything that exists, and nothing else."""

from __future__ import annotations

import ast
import inspect
import re
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.core.management import load_command_class
from django.core.management.base import BaseCommand
from django.core.management.commands.runserver import Command as Runserver
from django.db.models import Model
from django.test import override_settings

import pg_eventstream
from pg_eventstream import sse
from pg_eventstream.caching import never_cached
from pg_eventstream.conf import MOST_CHANNELS, Conf, conf
from pg_eventstream.consumers import progress
from pg_eventstream.operate import state
from tests.support.documentation import name_of, pages, prose_of, text_of

PACKAGE = Path(pg_eventstream.__file__).parent
SOURCE = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
#: Settings of django-eventstream that a project removes: `checks` reports them.
LEFTOVERS = {"EVENTSTREAM_STORAGE_CLASS", "EVENTSTREAM_STORAGE_CONNECTION", "EVENTSTREAM_REDIS"}


def sections(name: str, level: int = 2) -> dict[str, str]:
    """The text below each heading of a level."""
    parts = re.split(rf"^{'#' * level} +(.+)$", text_of(name), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def first_cells(text: str) -> list[str]:
    """The first cell of each row of the tables, without the headings."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [row.split("|")[1].strip() for row in rows]
    return [cell for cell in cells if cell.startswith("`")]


# Settings


def test_settings() -> None:
    used = set(re.findall(r'"((?:EVENTSTREAM|GRIP)_[A-Z_]+)"', SOURCE)) - LEFTOVERS
    headings = " ".join(sections("docs/reference/settings.md", 3))
    assert set(re.findall(r"(?:EVENTSTREAM|GRIP)_[A-Z_]+", headings)) == used
    assert len(used) >= len([name for name in vars(Conf) if not name.startswith("_")]) - 1


@pytest.mark.parametrize("name", [name_of(page) for page in pages()])
def test_no_page_names_a_setting_that_is_not_in_the_reference(name: str) -> None:
    known = set(
        re.findall(r"\b(?:EVENTSTREAM|GRIP)_[A-Z_]+", text_of("docs/reference/settings.md"))
    )
    named = set(re.findall(r"`((?:EVENTSTREAM|GRIP)_[A-Z_]+)`", text_of(name)))
    assert named - LEFTOVERS <= known


def test_every_setting_says_its_type_and_default() -> None:
    for heading, text in sections("docs/reference/settings.md", 3).items():
        assert re.match(r"\n\nType: .*Default: ", text, re.DOTALL), heading


def test_defaults_are_those_of_the_code() -> None:
    table = re.findall(
        r"^\| .*?`((?:EVENTSTREAM|GRIP)_\w+)`.*\| `([^`]*)`", text_of("docs/reference/settings.md"),
        re.MULTILINE,
    )  # fmt: skip
    attributes = {
        "EVENTSTREAM_DATABASE": "database_alias",
        "EVENTSTREAM_REPLAY_AGE": "replay_age",
        "EVENTSTREAM_CHANNELMANAGER_CLASS": "channelmanager_class",
        "EVENTSTREAM_CHANNEL_LIMIT": "channel_limit",
        "EVENTSTREAM_NEXT_LINK_TIMEOUT": "next_link_timeout",
        "EVENTSTREAM_MAX_AGE": "max_age",
        "EVENTSTREAM_SAFETY_POLL": "safety_poll",
        "EVENTSTREAM_ALLOW_CREDENTIALS": "allow_credentials",
        "GRIP_PREFIX": "grip_prefix",
    }
    with override_settings():
        from django.conf import settings

        for name in attributes:
            if hasattr(settings, name):
                delattr(settings, name)
        found = {name: getattr(conf, attribute) for name, attribute in attributes.items()}
    written = {name: ast.literal_eval(value) for name, value in table if name in attributes}
    assert written == found
    assert f"1 to {MOST_CHANNELS}" in text_of("docs/reference/settings.md")


# Commands

COMMANDS = sorted(path.stem for path in (PACKAGE / "management" / "commands").glob("[a-z]*.py"))


def options_of(command: BaseCommand, base: BaseCommand) -> set[str]:
    def named(parser: ArgumentParser) -> set[str]:
        names: set[str] = set()
        for action in parser._actions:
            names.update(action.option_strings)
            if isinstance(action, _SubParsersAction):
                names.update(*map(named, action.choices.values()))
        return names

    def parser_of(one: BaseCommand) -> ArgumentParser:
        return one.create_parser("manage.py", "command")

    return named(parser_of(command)) - named(parser_of(base))


def test_commands() -> None:
    headings = set(sections("docs/reference/commands.md"))
    assert headings == {*COMMANDS, "The demo"}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_of_a_command(name: str) -> None:
    command = load_command_class("pg_eventstream", name)
    base = Runserver() if name.startswith("runserver") else BaseCommand()
    text = sections("docs/reference/commands.md")[name]
    documented = {cell.strip("`").split()[0] for cell in first_cells(text) if "--" in cell}
    assert documented == options_of(command, base)
    usage = re.search(rf"```text\npython manage\.py {name}(.*?)\n```", text, re.DOTALL)
    assert usage
    assert set(re.findall(r"--[\w.-]+", usage[1])) == documented


def test_keys_of_the_status() -> None:
    """The fields of the state, and those of the objects in it."""
    text = sections("docs/reference/commands.md")["eventstream_status"]
    rows = text[text.index("| key |") : text.index("| of a consumer |")].splitlines()[2:]
    cells = [row.split("|")[1:3] for row in rows if row.startswith("| ")]
    keys = [key for cell, _ in cells for key in re.findall(r"`(\w+)`", cell)]
    assert sorted(keys) == sorted(field.name for field in fields(state.State))
    words = re.findall(r"`(\w+)`", " ".join(meaning for _, meaning in cells))
    for part in (state.Session, state.ProxyState, state.Waiting, state.OldestTransaction,
                 state.Pruning, state.TableState, state.Problem):  # fmt: skip
        assert {field.name for field in fields(part)} <= set(words), part


def test_keys_of_a_consumer_in_the_status() -> None:
    text = sections("docs/reference/commands.md")["eventstream_status"]
    words = re.findall(r"`(\w+)`", text[text.index("| of a consumer |") :])
    for part in (progress.ConsumerState, progress.Holder, progress.TroubledSlot, progress.Working):
        assert {field.name for field in fields(part)} <= set(words), part


def test_options_of_the_demo() -> None:
    tree = ast.parse((PACKAGE / "demo" / "__main__.py").read_text(encoding="utf-8"))
    options = {
        call.args[0].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and getattr(call.func, "attr", "") == "add_argument"
        and isinstance(call.args[0], ast.Constant)
    }
    text = sections("docs/reference/commands.md")["The demo"]
    assert {cell.strip("`").split()[0] for cell in first_cells(text)} == options
    assert len(options) > 2


# Checks


def test_checks() -> None:
    documented = sections("docs/reference/checks.md", 3)
    assert set(documented) == set(re.findall(r'"(pg_eventstream\.[EWI]\d{3})"', SOURCE))
    assert [name for name, text in documented.items() if "**Remedy:** " not in text] == []


# Tables

MODELS = {
    model._meta.db_table: model for model in apps.get_app_config("pg_eventstream").get_models()
}


def test_tables() -> None:
    assert set(sections("docs/reference/tables.md")) == set(MODELS)


@pytest.mark.parametrize("table", MODELS)
def test_columns_and_constraints_of_a_table(table: str) -> None:
    model: type[Model] = MODELS[table]
    text = sections("docs/reference/tables.md")[table]
    columns = {field.column for field in model._meta.local_concrete_fields if field.column}
    constraints = {constraint.name for constraint in model._meta.constraints}
    cells = [cell.strip("`") for cell in first_cells(text)]
    assert sorted(cells) == sorted({*columns, *constraints})


def test_reserved_types_are_listed_with_the_constraint() -> None:
    (row,) = re.findall(r"^\| `pg_eventstream_type_not_reserved` .*$",
                        text_of("docs/reference/tables.md"), re.MULTILINE)  # fmt: skip
    assert set(re.findall(r"`([a-z]+-[a-z]+)`", row)) == set(sse.RESERVED_TYPES)


# Python


#: The modules besides `pg_eventstream` itself whose names a project imports.
MODULES = [
    "channelmanager",
    "consumers",
    "renderers",
    "router",
    "routing",
    "testing",
    "views",
    "viewsets",
]
_DIRECTIVE = re.compile(r"^`{3,}\{py:(\w+)\} ([\w.]+)(?:\((.*)\))?$", re.MULTILINE)


def documented() -> Iterator[tuple[str, str | None]]:
    """The names of the reference with their modules and signatures, methods with their classes."""
    inside = ""
    for kind, name, signature in _DIRECTIVE.findall(text_of("docs/reference/python.md")):
        if kind == "currentmodule":
            continue
        if kind == "method":
            yield f"{inside}.{name}", signature
            continue
        inside = name if name.startswith("pg_eventstream.") else f"pg_eventstream.{name}"
        yield inside, signature


def look_up(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError:
        return getattr(look_up(module), name)


def names_in(module: str) -> set[str]:
    names = {path for path, _ in documented()}
    return {path.removeprefix(f"{module}.") for path in names if path.rpartition(".")[0] == module}


def test_public_names() -> None:
    assert names_in("pg_eventstream") == set(pg_eventstream.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_public_names_of_a_module(name: str) -> None:
    module = import_module(f"pg_eventstream.{name}")
    assert names_in(module.__name__) == {*module.__all__} - {"sent_events"}


def test_every_documented_name_is_there_with_its_signature() -> None:
    for path, signature in documented():
        found = look_up(path)
        if not signature:
            continue
        parameters = [
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in inspect.signature(found).parameters.values()
            if parameter.name != "self"
        ]
        written = str(inspect.Signature(parameters)).strip("()").replace("Ellipsis", "...")
        assert signature == written, path


def test_fields_of_the_classes_are_documented() -> None:
    text = text_of("docs/reference/python.md")
    for path, _ in documented():
        found = look_up(path)
        short = path.removeprefix("pg_eventstream.")
        start = rf"^`{{4}}\{{py:\w+\}} (?:{re.escape(path)}|{re.escape(short)})(?:\([^\n]*\))?$"
        bodies = re.findall(start + r"(.*?)^`{4}$", text, re.DOTALL | re.MULTILINE)
        terms = [t for body in bodies for t in re.findall(r"^(`.*`)\n: ", body, re.MULTILINE)]
        named = set(re.findall(r"`(\w+)`", " ".join(terms)))
        if is_dataclass(found):
            assert named == {f.name for f in fields(found) if not f.name.startswith("_")}, path
        elif hasattr(found, "_fields"):  # a named tuple, described by what it is made for
            assert set(found._fields) <= set(re.findall(r"`(\w+)`", bodies[0])), path
        else:
            assert [name for name in named if not hasattr(found, name)] == [], path


def test_methods_of_channel_managers_are_documented() -> None:
    from pg_eventstream.channelmanager import ChannelManagerBase

    methods = {name for name in vars(ChannelManagerBase) if not name.startswith("_")}
    assert names_in("pg_eventstream.channelmanager.DefaultChannelManager") == methods


def test_loggers() -> None:
    text = sections("docs/reference/python.md")["Logging"]
    named = {cell.strip("`") for cell in first_cells(text)}
    used = set(re.findall(r'getLogger\("([\w.]+)"\)', SOURCE))
    used |= {
        ".".join(["pg_eventstream", *path.relative_to(PACKAGE).with_suffix("").parts])
        for path in PACKAGE.rglob("*.py")
        if "getLogger(__name__)" in path.read_text(encoding="utf-8")
    }
    assert named <= used
    assert len(named) > 3


# Wire format


def test_types_of_the_server() -> None:
    text = sections("docs/reference/wire-format.md", 3)["Events of the server"]
    assert {cell.strip("`") for cell in first_cells(text)} == set(sse.RESERVED_TYPES)
    assert f"nothing happened for {sse.KEEP_ALIVE_SECONDS} seconds" in text


def test_headers() -> None:
    from django.http import HttpResponse
    from django.test import RequestFactory

    text = text_of("docs/reference/wire-format.md")
    answer = never_cached(lambda request: HttpResponse())(RequestFactory().get("/"))
    assert f"| `Content-Type` | `{sse.CONTENT_TYPE}` |" in text
    assert f"| `Cache-Control` | `{answer['Cache-Control']}` |" in text


# Browser client


def test_options_of_the_browser_client() -> None:
    static = PACKAGE / "static" / "pg_eventstream"
    types = (static / "reconnecting-eventsource.d.mts").read_text(encoding="utf-8")
    (init,) = re.findall(
        r"interface ReconnectingEventSourceInit [^{]*\{(.*?)\n\}", types, re.DOTALL
    )
    options = set(re.findall(r"^  (\w+)\?:", init, re.MULTILINE)) | {"withCredentials"}
    text = sections("docs/reference/browser-client.md")["Constructor"]
    assert {cell.strip("`") for cell in first_cells(text)} == options


def test_size_of_the_browser_client() -> None:
    static = PACKAGE / "static" / "pg_eventstream"
    kilobytes = round((static / "reconnecting-eventsource.mjs").stat().st_size / 1000)
    assert f"is\n{kilobytes} kB" in prose_of("docs/reference/browser-client.md")
