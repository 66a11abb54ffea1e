"""The pages on metrics: all names, the examples, and what the package ships for Prometheus."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from django.core.management import load_command_class

import pg_eventstream
from pg_eventstream import instruments
from pg_eventstream.operate.prometheus.metrics import _UP, GAUGES
from tests.support.documentation import example, text_of
from tests.support.programs import installed
from tests.support.projects import Project
from tests.support.reader import add

SHIPPED = Path(pg_eventstream.__file__).parent / "operate" / "prometheus"
PAGE = "docs/production/monitoring.md"


def of_the_code() -> dict[str, tuple[str, str, str]]:
    """The type, label and meaning of each metric by its name."""
    found = {gauge.name: ("gauge", gauge.label or "", gauge.text) for gauge in GAUGES}
    found[_UP[0]] = ("gauge", "", _UP[1])
    for instrument in vars(instruments).values():
        name = str(getattr(instrument, "_name", ""))
        if name.startswith("pg_eventstream_"):
            kind = instrument._type
            full = f"{name}_total" if kind == "counter" else name
            found[full] = (kind, ", ".join(instrument._labelnames), instrument._documentation)
    return found


def test_metrics_of_the_reference_are_those_of_the_code() -> None:
    rows = re.findall(
        r"^\| `(pg_eventstream_\w+)` \| (\w+) \| `?(\w*)`? \| (.+) \|$",
        text_of("docs/reference/metrics.md"),
        re.MULTILINE,
    )
    written = {name: (kind, label, text) for name, kind, label, text in rows}
    assert len(rows) == len(written)
    assert written == of_the_code()
    assert len(written) > 30


@pytest.mark.parametrize("file", ["alerts.yml", "grafana.json"])
def test_shipped_files_name_metrics_that_there_are(file: str) -> None:
    known = of_the_code()
    for name in set(re.findall(r"pg_eventstream_\w+", (SHIPPED / file).read_text())):
        base = re.sub("_(bucket|sum|count)$", "", name)
        assert name in known or known.get(base, [""])[0] == "histogram", name


def test_alerts_are_explained() -> None:
    alerts = re.findall(r"- alert: (\w+)", (SHIPPED / "alerts.yml").read_text())
    table = re.findall(r"^\| `(EventStream\w+)` \|", text_of(PAGE), re.MULTILINE)
    assert table == alerts
    assert len(alerts) > 10


def test_files_are_where_the_page_says() -> None:
    command = (
        example("docs/production/monitoring.md", "__path__").code.removeprefix("python ").strip()
    )
    directory = subprocess.run(
        ["sh", "-c", f"exec '{sys.executable}' {command}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert {path.name for path in Path(directory).iterdir()} >= {"alerts.yml", "grafana.json"}


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-view.yml"])
def test_prometheus_accepts_the_configuration(name: str, tmp_path: Path) -> None:
    configurations = {
        "prometheus.yml": example("docs/production/monitoring.md", "# prometheus.yml"),
        "prometheus-view.yml": example("docs/production/monitoring.md", "# prometheus-view.yml"),
    }
    (tmp_path / name).write_text(configurations[name].code)
    (tmp_path / "alerts.yml").write_text((SHIPPED / "alerts.yml").read_text())
    (tmp_path / "eventstream-token").write_text("secret")
    done = subprocess.run(
        [installed("promtool"), "check", "config", name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_port_and_paths_are_the_same_in_all_examples() -> None:
    command = example("docs/production/monitoring.md", "eventstream_publisher --metrics-port").code
    port = command.split()[-1]
    assert f":{port}" in example("docs/production/monitoring.md", "# prometheus.yml").code
    pod = example("docs/production/monitoring.md", "livenessProbe").code
    assert f"containerPort: {port}" in pod
    arguments = json.loads(re.findall(r"command: (\[.*\])", pod)[0])
    assert arguments[:4] == [*command.split()[:3], f"--metrics-port={port}"]
    assert re.findall(r"path: (/\w+)", pod) == ["/live", "/ready"]


def test_command_of_the_consumers_port_is_one_that_the_parser_accepts() -> None:
    shown = example("docs/production/monitoring.md", "eventstream_consumers run")
    _, _, name, *arguments = shown.code.split()
    command = load_command_class("pg_eventstream", name)
    parsed = command.create_parser("manage.py", name).parse_args(arguments)
    assert (parsed.subcommand, parsed.processes, parsed.metrics_port) == ("run", 4, 9401)


def test_view_is_mounted_as_the_page_says(project: Project) -> None:
    add(project, example("docs/production/monitoring.md", "urlpatterns += [path"))
    project.manage("migrate", "-v0")
    code = """
from django.test import Client
from django.contrib.auth.models import Permission, User
user = User.objects.create_user("ann")
client = Client()
client.force_login(user)
print(client.get("/metrics/eventstream").status_code)
user.user_permissions.add(Permission.objects.get(codename="view_event"))
print(client.get("/metrics/eventstream").content.decode())
"""
    printed = project.manage("shell", "--no-imports", "-c", code)
    assert printed.startswith("403\n")
    assert "pg_eventstream_up 1.0" in printed


def test_hook_of_gunicorn_forgets_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    (tmp_path / "gauge_livesum_7.db").touch()
    module: dict[str, Callable[..., None]] = {}
    exec(example("docs/production/monitoring.md", "def child_exit").code, module)
    module["child_exit"](None, types.SimpleNamespace(pid=7))
    assert list(tmp_path.iterdir()) == []
