"""The browser client as files."""

from __future__ import annotations

import json
import re
from pathlib import Path

from django.core.management import call_command
from django.test import override_settings

from tests.support.classic_script import CLASSIC, MODULE, STATIC, classic

# The files


def test_both_scripts_are_one() -> None:
    written = CLASSIC.read_text(encoding="utf-8")
    assert written == classic(MODULE.read_text(encoding="utf-8")), (
        "run: python -m tests.support.classic_script"
    )


def test_scripts_can_be_collected_under_hashed_names(tmp_path: Path) -> None:
    storage = "django.contrib.staticfiles.storage.ManifestStaticFilesStorage"
    with override_settings(
        INSTALLED_APPS=["django.contrib.staticfiles", "pg_eventstream"],
        STATIC_ROOT=tmp_path,
        STATIC_URL="/static/",
        STORAGES={"staticfiles": {"BACKEND": storage}},
    ):
        call_command("collectstatic", interactive=False, verbosity=0)
    hashed = json.loads((tmp_path / "staticfiles.json").read_text())["paths"]
    for path in (MODULE, CLASSIC):
        name = path.relative_to(STATIC).as_posix()
        assert re.fullmatch(rf"{path.stem}\.[0-9a-f]+", Path(hashed[name]).stem)
        assert (tmp_path / hashed[name]).read_bytes() == path.read_bytes()
