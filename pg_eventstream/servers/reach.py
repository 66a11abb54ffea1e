"""Finds directories that the user who runs PostgreSQL can reach, when this process is root.

No existing file changes its owner or mode: a directory that the user cannot reach is replaced by a
substitute that the user can reach.
"""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from pg_eventstream.servers.processes import ServerError

# Every user can create directories here, and they survive a restart of the machine.
_SHARED = Path("/var/tmp")
_PREFIX = "pg_eventstream-"
# A file in a substitute, which contains the path of the original directory.
_NAME = "stands-in-for"


def is_allowed(account: pwd.struct_passwd, what: str, path: Path) -> bool:
    """Whether the user may read (``-r``), or search and execute (``-x``), this path."""
    asked = subprocess.run(
        ["/bin/sh", "-c", f'test {what} "$1"', "sh", path],
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=[],
        cwd="/",
        check=False,
    )
    return asked.returncode == 0


def find_reachable(account: pwd.struct_passwd, directory: Path) -> Path:
    """The directory if the user can reach it, or else its substitute in /var/tmp.

    The substitute is always the same: ``directory / "elsewhere"`` is a link to it.
    """
    if is_allowed(account, "-x", directory):
        return directory
    link = directory / "elsewhere"
    if not link.is_dir():
        _remove_unused_substitutes()
        link.unlink(missing_ok=True)
        place = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_SHARED))
        place.chmod(0o755)
        link.symlink_to(place)
        (place / _NAME).write_text(str(directory))
    place = link.resolve()
    if not is_allowed(account, "-x", place):
        raise ServerError(
            f"PostgreSQL must run as the user {account.pw_name}, which can reach neither"
            f" {directory} nor {place}. Use another directory, or do not start it as root."
        )
    return place


def _remove_unused_substitutes() -> None:
    """Remove substitutes of directories that no longer exist, such as temporary ones."""
    for name in _SHARED.glob(f"{_PREFIX}*/{_NAME}"):
        place = name.parent
        if place.is_symlink() or place.stat().st_uid != os.geteuid():
            continue
        link = Path(name.read_text()) / "elsewhere"
        if link.resolve() != place.resolve() and not _runs_in(place):
            shutil.rmtree(place)


def _runs_in(place: Path) -> bool:
    try:
        os.kill(int((place / "data" / "postmaster.pid").read_text().split()[0]), 0)
    except (OSError, ValueError, IndexError):
        return False
    return True


def find_runnable(account: pwd.struct_passwd, programs: Path, place: Path) -> Path:
    """The wheel's programs if the user can run them, or else a copy of them in ``place``."""
    postgres = programs / "postgres"
    if is_allowed(account, "-r", postgres) and is_allowed(account, "-x", postgres):
        return programs
    package = programs.parents[1]
    if programs.parent.name != "pginstall":
        raise ServerError(
            f"The user {account.pw_name} cannot run the programs in {programs}. Make them"
            " accessible to all users, or do not start PostgreSQL as root."
        )
    found = postgres.stat()
    copy = place / f"programs-{found.st_mtime_ns:x}-{found.st_size:x}"
    if not copy.exists():
        unfinished = copy.with_suffix(".unfinished")  # in case this process is interrupted
        shutil.rmtree(unfinished, ignore_errors=True)
        for source in (package, package.with_name(f"{package.name}.libs")):
            shutil.copytree(source, unfinished / source.name)
        for path in (unfinished, *unfinished.rglob("*")):
            mode = path.stat().st_mode
            path.chmod(mode | stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0))
        unfinished.rename(copy)
    return copy / programs.relative_to(package.parent)
