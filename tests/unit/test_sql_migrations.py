"""The plain SQL of ``migrations/``: the same schema as Django's, safe in any schema."""

from __future__ import annotations

from migrations import generate
from tests.support.roles import MIGRATIONS


def test_every_migration_has_its_sql_file_and_no_other_is_left() -> None:
    assert sorted(path.stem for path in MIGRATIONS.glob("[0-9]*.sql")) == generate.names()
