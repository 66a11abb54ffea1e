from __future__ import annotations

import os
from argparse import ArgumentParser
from typing import Any
from urllib.parse import SplitResult, urlencode, urlsplit, urlunsplit

import urllib3
from django.conf import settings
from django.core.management import get_commands, load_command_class
from django.core.management.base import CommandError
from django.http.request import validate_host
from django.utils.autoreload import DJANGO_AUTORELOAD_ENV

from pg_eventstream.conf import conf
from pg_eventstream.grip.proxy import Proxy

# The project's own runserver: that of Django, staticfiles or an ASGI server.
_Runserver: Any = type(load_command_class(get_commands()["runserver"], "runserver"))
_PORTS = {"http": 80, "https": 443}


class Command(_Runserver):  # type: ignore[misc]
    help = (
        "Makes the ngrok tunnel to this machine the origin of Fanout Cloud, so that this machine"
        " serves its streams, then runs runserver. Start ngrok first: ngrok http 8000."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--ngrok-api",
            default="http://localhost:4040/api",
            metavar="URL",
            help="URL at which ngrok lists its tunnels; default %(default)s",
        )

    def run(self, **options: Any) -> None:
        # The autoreloader runs this again in a child process, and after each change.
        if os.environ.get(DJANGO_AUTORELOAD_ENV) != "true":
            self._announce(_fetch_tunnels(options["ngrok_api"], self.port))
        super().run(**options)

    def _announce(self, tunnels: list[SplitResult]) -> None:
        if not conf.grip_proxies:
            raise CommandError("No GRIP proxy is configured; set GRIP_URL.")
        for config in conf.grip_proxies:
            _set_origin(config, tunnels)
            for tunnel in tunnels:
                self.stdout.write(f"{tunnel.geturl()} is the origin of {Proxy(config).name}")
        for tunnel in tunnels:
            if not validate_host(tunnel.hostname or "", settings.ALLOWED_HOSTS):
                self.stderr.write(
                    f"Add {tunnel.hostname!r} to ALLOWED_HOSTS, or Django will refuse requests"
                    " through the tunnel."
                )


def _fetch_tunnels(api: str, port: str) -> list[SplitResult]:
    """The public URLs of ngrok's tunnels to this port, or of all its tunnels if there is none."""
    # https://ngrok.com/docs/agent/api, "List tunnels"
    try:
        response = _request("GET", f"{api.rstrip('/')}/tunnels")
        tunnels = [t for t in response.json()["tunnels"] if t["proto"] in _PORTS]
    except urllib3.exceptions.HTTPError as e:
        raise CommandError(
            f"ngrok does not answer at {api}: {e}. Start it first: ngrok http {port}. If its API is"
            " at another address (web_addr in its configuration), use --ngrok-api."
        ) from e
    except (ValueError, LookupError, TypeError) as e:
        raise CommandError(
            f"The server at {api} is not ngrok (status {response.status}). Give the address of"
            " ngrok's API with --ngrok-api."
        ) from e
    if not tunnels:
        raise CommandError(
            f"ngrok is running, but has no HTTP tunnel. Start one: ngrok http {port}"
        )
    here = [t for t in tunnels if str(t.get("config", {}).get("addr")).endswith(f":{port}")]
    return [urlsplit(tunnel["public_url"]) for tunnel in here or tunnels]


def _set_origin(config: dict[str, Any], tunnels: list[SplitResult]) -> None:
    # gripcontrol: grippubcontrol.py, set_origin
    fields = {"rewrite_host": "true", "over_http": "true"}
    for tunnel in tunnels:
        prefix = "ssl_" if tunnel.scheme == "https" else ""
        fields[f"{prefix}host"] = tunnel.hostname or ""
        fields[f"{prefix}port"] = str(tunnel.port or _PORTS[tunnel.scheme])
    uri = urlsplit(config["control_uri"])
    url = urlunsplit(uri._replace(path=f"{uri.path.rstrip('/')}/http/default/"))
    proxy = Proxy(config)
    headers = {
        "Content-Type": "application/x-www-form-urlencoded",
        **proxy.authorization(),
    }
    try:
        response = _request("POST", url, body=urlencode(fields), headers=headers)
    except urllib3.exceptions.HTTPError as e:
        raise CommandError(f"The proxy {proxy.name} cannot be reached: {e}") from e
    if response.status in (404, 405, 501):
        raise CommandError(
            f"The origin of the proxy {proxy.name} cannot be set (it answered {response.status})."
            " That works only with Fanout Cloud. Pushpin needs no tunnel: put * localhost:8000"
            " into its routes file, and use runserver."
        )
    if not 200 <= response.status < 300:
        text = response.data[:300].decode(errors="replace").strip()
        raise CommandError(
            f"The proxy {proxy.name} did not accept the tunnel as its origin: {response.status}"
            f" {text}. Check iss and key in GRIP_URL."
        )


def _request(method: str, url: str, **more: Any) -> urllib3.BaseHTTPResponse:
    timeout = urllib3.Timeout(connect=3, read=10)
    with urllib3.PoolManager(retries=False, timeout=timeout) as http:
        return http.request(method, url, redirect=False, **more)
