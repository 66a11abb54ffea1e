"""The state for Prometheus, and the port of publishers and consumers. Needs prometheus-client.

    metrics      the state as gauges
    health       judges whether a publisher or consumers are alive and ready
    server       the HTTP port: metrics and probes
    latest       the latest result of a slow function, shared by concurrent callers

``alerts.yml`` and ``grafana.json`` are for projects to copy.
"""
