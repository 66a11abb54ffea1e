"""The state for Prometheus, and the port of a publisher. Needs prometheus-client.

    metrics      the state as gauges
    health       judges whether a publisher is alive and ready
    server       the HTTP port of a publisher: metrics and probes
    latest       the latest result of a slow function, shared by concurrent callers

``alerts.yml`` and ``grafana.json`` are for projects to copy.
"""
