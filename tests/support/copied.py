"""Copies of the running PostgreSQL: standbys, and servers with other settings."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

from pg_eventstream.servers.postgres import Postgres


def copied(source: Postgres, directory: Path, *arguments: str, **settings: str) -> Postgres:
    """Start a copy of the running cluster, with more settings."""
    directory.mkdir()
    user = None
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        os.chown(directory, user.pw_uid, user.pw_gid)
    subprocess.run(
        [
            source.program("pg_basebackup"),
            f"--dbname={source.dsn()}",
            f"--pgdata={directory / 'data'}",
            *("--checkpoint=fast", "--no-sync", *arguments),
        ],
        user=None if user is None else user.pw_uid,
        group=None if user is None else user.pw_gid,
        extra_groups=None if user is None else [],
        cwd=directory,
        check=True,
        timeout=60,
    )
    copy = Postgres(directory, bin_dir=source.bin_dir, settings={**source.settings, **settings})
    copy.start()
    return copy
