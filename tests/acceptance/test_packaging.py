"""The wheel contains everything that runs, and runs without the source tree."""

from __future__ import annotations

import email
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pg_eventstream
from tests.support.database import Database

ROOT = Path(__file__).parents[2]
PACKAGE = Path(pg_eventstream.__file__).parent

SETTINGS = """
SECRET_KEY = "for this test only"
USE_TZ = True
DATABASES = {{"default": {{"ENGINE": "django.db.backends.postgresql", **{address!r}}}}}
INSTALLED_APPS = ["pgtrigger", "pg_eventstream", "pg_eventstream.demo"]
TEMPLATES = [{{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}}]
"""

PROJECT = """
import django
from django.core.management import call_command
from django.template.loader import get_template

django.setup()
call_command("check", fail_level="WARNING")
call_command("migrate", verbosity=0)
call_command("makemigrations", check=True, dry_run=True, verbosity=0)
get_template("pg_eventstream_demo/index.html")

import pg_eventstream

pg_eventstream.send_event("c", "t", 1)
call_command("eventstream_publisher", once=True, verbosity=0)
call_command("eventstream_prune")

from pg_eventstream.postgres.connector import explain, psycopg

hint = explain(psycopg.errors.InsufficientPrivilege("permission denied")).split()[-1]
assert "GRANT" in open(hint).read(), hint
print(pg_eventstream.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            *(sys.executable, "-m", "build", "--wheel", "--no-isolation"),
            *("--outdir", str(directory), str(ROOT)),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_holds_the_whole_package(files: list[str]) -> None:
    source = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    plain_sql = {
        f"pg_eventstream/plain_sql/{path.name}"
        for path in (ROOT / "migrations").iterdir()
        if path.suffix in (".sql", ".md")
    }
    assert {name for name in files if ".dist-info/" not in name} == source | plain_sql
    for needed in (
        "py.typed",
        "sql/0001_sequence.sql",
        "migrations/0001_initial.py",
        "management/commands/eventstream_publisher.py",
        "demo/__main__.py",
        "demo/migrations/0001_initial.py",
        "demo/templates/pg_eventstream_demo/index.html",
    ):
        assert f"pg_eventstream/{needed}" in files


def test_wheel_contains_only_the_package(files: list[str]) -> None:
    assert {name.split("/")[0] for name in files} == {
        "pg_eventstream",
        next(name.split("/")[0] for name in files if ".dist-info/" in name),
    }


def test_wheel_holds_the_license_and_says_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata_name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = archive.read(metadata_name).decode()
        assert metadata_name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    required = {
        re.split(r"[^\w-]", line, maxsplit=1)[0].lower()
        for line in email.message_from_string(metadata).get_all("Requires-Dist", [])
        if "extra ==" not in line
    }
    assert {"django", "psycopg", "django-pgtrigger", "gripcontrol"} <= required
    assert "pytest" not in required
    for name in required:
        importlib.metadata.version(name)  # it exists in the version that these tests run with


def test_installed_wheel_works_without_the_source_tree(
    wheel: Path, database: Database, tmp_path: Path
) -> None:
    installed, project = tmp_path / "installed", tmp_path / "project"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
            *("--disable-pip-version-check", "--target", str(installed), str(wheel)),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    project.mkdir()
    name = f"{database.name}_wheel"
    database.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    server = database.postgres
    address = {"NAME": name, "USER": "postgres", "HOST": server.host, "PORT": server.port}
    (project / "settings.py").write_text(SETTINGS.format(address=address))
    (project / "everything.py").write_text(PROJECT)

    # Neither this source tree nor another one; an editable install puts one on the path.
    elsewhere = [
        entry for entry in sys.path if entry and not (Path(entry) / "pyproject.toml").exists()
    ]
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "settings",
        "PYTHONPATH": os.pathsep.join([str(project), str(installed), *elsewhere]),
    }

    def python(*arguments: str) -> str:
        # Without "site" the path is exactly this; an editable install would add the source tree.
        done = subprocess.run(
            [sys.executable, "-S", *arguments],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = python("everything.py").splitlines()[-1]
    assert Path(where).is_relative_to(installed)
    assert Database(server, name).fetch("SELECT channel, eid FROM pg_eventstream_stream") == [
        ("c", 1)
    ]
    assert "usage" in python("-m", "pg_eventstream.demo", "--help")
