"""Writes the app's migrations as plain SQL to this directory: ``python -m migrations.generate``.

Each file is the unchanged output of Django's ``sqlmigrate`` under a comment. That command needs a
database, so a temporary PostgreSQL is started for it (from the ``demo`` extra of the package). A
test compares the files with the migrations.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from django.core.management import call_command

DIRECTORY = Path(__file__).parent
APP = "pg_eventstream"
MIGRATIONS = DIRECTORY.parent / APP / "migrations"

_HEADER = """\
-- Generated from {source}. Do not edit.
-- Again with: python -m migrations.generate
-- How to apply it, and which route to take: migrations/README.md

"""


def names() -> list[str]:
    """The app's migrations, in the order in which they apply."""
    return sorted(path.stem for path in MIGRATIONS.glob("[0-9]*.py"))


def render(name: str) -> str:
    """One migration as SQL, in one transaction. Needs a database that Django can connect to."""
    sql = io.StringIO()
    call_command("sqlmigrate", APP, name, stdout=sql, no_color=True)
    source = MIGRATIONS.joinpath(f"{name}.py").relative_to(DIRECTORY.parent)
    return _HEADER.format(source=source.as_posix()) + sql.getvalue()


def main() -> None:
    import django
    from django.conf import settings

    from pg_eventstream.servers.postgres import Postgres

    with tempfile.TemporaryDirectory() as directory, Postgres(Path(directory)) as postgres:
        settings.configure(
            INSTALLED_APPS=["pgtrigger", APP],
            DATABASES={
                "default": {
                    "ENGINE": "django.db.backends.postgresql",
                    "NAME": "postgres",
                    "USER": "postgres",
                    "HOST": postgres.host,
                    "PORT": postgres.port,
                }
            },
        )
        django.setup()
        for name in names():
            path = DIRECTORY / f"{name}.sql"
            path.write_text(render(name), encoding="utf-8")
            sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
