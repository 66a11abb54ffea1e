"""Each shipped alert fires when it should, after its time, and not before."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pg_eventstream
from tests.support.programs import installed

RULES = Path(pg_eventstream.__file__).parent / "operate" / "prometheus" / "alerts.yml"
PROXY = 'proxy="http://p"'
CONSUMER = 'consumer="stock"'

#: What a series is in a healthy installation, each of them seen by two instances.
HEALTHY = {
    "pg_eventstream_up": 1,
    "pg_eventstream_leader_present": 1,
    "pg_eventstream_publishers_standing_by": 1,
    "pg_eventstream_heartbeat_age_seconds": 9,
    "pg_eventstream_listen_works": 1,
    "pg_eventstream_waiting_oldest_seconds": 0,
    f"pg_eventstream_proxy_lag_seconds{{{PROXY}}}": 0,
    f"pg_eventstream_proxy_trouble{{{PROXY}}}": 0,
    f"pg_eventstream_consumer_processes{{{CONSUMER}}}": 2,
    f"pg_eventstream_consumer_paused{{{CONSUMER}}}": 0,
    f"pg_eventstream_consumer_replaying{{{CONSUMER}}}": 0,
    f"pg_eventstream_consumer_declared{{{CONSUMER}}}": 1,
    f"pg_eventstream_consumer_heartbeat_age_seconds{{{CONSUMER}}}": 9,
    f"pg_eventstream_consumer_lag_seconds{{{CONSUMER}}}": 1,
    f"pg_eventstream_consumer_stopped_slots{{{CONSUMER}}}": 0,
    f"pg_eventstream_consumer_parked{{{CONSUMER}}}": 0,
    "pg_eventstream_pruning_behind_seconds": 0,
    "pg_eventstream_notification_queue_usage_ratio": 0.01,
    "pg_eventstream_oldest_transaction_seconds": 100,
    "pg_eventstream_trigger_ok": 1,
    "pg_eventstream_probe_success": 1,
    f"pg_eventstream_refused_events_total{{{PROXY}}}": 0,
}

#: The alert, a series, its value when something is wrong, minutes at which nothing fires yet, and
#: at which the alert fires.
CASES: list[tuple[str, str, str, int, int]] = [
    ("DatabaseUnreadable", "up", "0", 1, 3),
    ("NoLeader", "leader_present", "0", 0, 2),
    ("HeartbeatOld", "heartbeat_age_seconds", "61", 0, 2),
    ("ProxyLag", f"proxy_lag_seconds{{{PROXY}}}", "31", 0, 2),
    ("ProxyTrouble", f"proxy_trouble{{{PROXY}}}", "1", 1, 3),
    ("NotSequenced", "waiting_oldest_seconds", "31", 0, 2),
    ("TriggerMissing", "trigger_ok", "0", 0, 2),
    ("ListenFails", "listen_works", "0", 4, 6),
    ("NoStandby", "publishers_standing_by", "0", 9, 11),
    ("ConsumerNotRunning", f"consumer_processes{{{CONSUMER}}}", "0", 1, 3),
    ("ConsumerSilent", f"consumer_heartbeat_age_seconds{{{CONSUMER}}}", "61", 0, 2),
    ("ConsumerStopped", f"consumer_stopped_slots{{{CONSUMER}}}", "1", 0, 2),
    ("ConsumerLagging", f"consumer_lag_seconds{{{CONSUMER}}}", "61", 4, 6),
    ("EventsParked", f"consumer_parked{{{CONSUMER}}}", "3", 0, 2),
    ("PruningBehind", "pruning_behind_seconds", "3601", 9, 11),
    ("NotificationQueueFilling", "notification_queue_usage_ratio", "0.11", 4, 6),
    ("OldTransaction", "oldest_transaction_seconds", "3601", 9, 11),
    ("EventsRefused", f"refused_events_total{{{PROXY}}}", "1", -1, 1),
    ("ProbeFailing", "probe_success", "0", 0, 2),
]
#: Values with which one of these alerts does not fire.
QUIET: list[tuple[str, dict[str, str]]] = [
    ("ConsumerNotRunning", {"consumer_paused": "1"}),
    ("ConsumerNotRunning", {"consumer_declared": "0"}),
    ("ConsumerLagging", {"consumer_paused": "1"}),
    ("ConsumerLagging", {"consumer_replaying": "1"}),
]
BEFORE = 5  # minutes of health


def series_of(name: str, instance: str) -> str:
    base, _, labels = name.partition("{")
    inner = ", ".join(filter(None, [labels.rstrip("}"), f'instance="{instance}"', 'job="a"']))
    return f"{base}{{{inner}}}"


def one_test(wrong: str = "", value: str = "", **always: str) -> dict[str, object]:
    """Series of two instances: five minutes of health, and then one value is wrong."""
    series = []
    for name, usual in HEALTHY.items():
        healthy = always.get(re.sub(r"^pg_eventstream_|{.*", "", name), str(usual))
        then = value if name == wrong else healthy
        series += [
            {
                "series": series_of(name, instance),
                "values": f"{healthy}x{BEFORE - 1} {then}x30",
            }
            for instance in "12"
        ]
    return {"interval": "1m", "input_series": series}


def fires(minute: int, *alerts: tuple[str, str]) -> dict[str, object]:
    """What fires, as a name with more labels."""
    return {
        "expr": 'count by (alertname, proxy, consumer) (ALERTS{alertstate="firing"})',
        "eval_time": f"{minute}m",
        "exp_samples": [
            {"labels": f'{{alertname="EventStream{name}"{labels}}}', "value": 1}
            for name, labels in alerts
        ],
    }


def test_each_alert_fires_alone_and_in_time(tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text(RULES.read_text())
    tests = [{**one_test(), "promql_expr_test": [fires(30)]}]
    for name, series, value, quiet, loud in CASES:
        labels = "".join(f", {label}" for label in (PROXY, CONSUMER) if label in series)
        tests.append(
            {
                **one_test(f"pg_eventstream_{series}", value),
                "promql_expr_test": [
                    fires(BEFORE + quiet),
                    fires(BEFORE + loud, (name, labels)),
                ],
            }
        )
    for case, also in QUIET:
        (_, series, value, *_) = next(one for one in CASES if one[0] == case)
        silent = one_test(f"pg_eventstream_{series}", value, **also)
        tests.append({**silent, "promql_expr_test": [fires(30)]})
    tests.append(
        {
            "interval": "1m",
            "input_series": [{"series": "up", "values": "0x30"}],
            "promql_expr_test": [fires(1), fires(4, ("NotScraped", ""))],
        }
    )
    suite = {"rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yml").write_text(json.dumps(suite))  # JSON is YAML
    done = subprocess.run(
        [installed("promtool"), "test", "rules", "tests.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_case() -> None:
    alerts = re.findall(r"- alert: EventStream(\w+)", RULES.read_text())
    assert {*alerts} == {"NotScraped", *(case[0] for case in CASES)}
