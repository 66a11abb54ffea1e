"""Places that the user who runs PostgreSQL can reach, when we are root and keep ours to ourselves.

Nothing that is there already changes its owner or its mode: what that user cannot reach gets a
stand-in that it can.
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

# Where everybody may have directories of their own, and keeps them over a restart.
_SHARED = Path("/var/tmp")
_PREFIX = "pg_eventstream-"
# In a directory that stands in for another: which that is.
_NAME = "stands-in-for"


def may(account: pwd.struct_passwd, what: str, path: Path) -> bool:
    """Whether the user may read (``-r``) or search and execute (``-x``) it."""
    asked = subprocess.run(
        ["/bin/sh", "-c", f'test {what} "$1"', "sh", path],
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=[],
        cwd="/",
        check=False,
    )
    return asked.returncode == 0


def reachable(account: pwd.struct_passwd, directory: Path) -> Path:
    """The directory, if the user can reach it, or else one in /var/tmp that stands in for it.

    That is always the same one: ``directory / "elsewhere"`` leads to it.
    """
    if may(account, "-x", directory):
        return directory
    link = directory / "elsewhere"
    if not link.is_dir():
        _remove_what_stands_in_for_nothing()
        link.unlink(missing_ok=True)
        place = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_SHARED))
        place.chmod(0o755)
        link.symlink_to(place)
        (place / _NAME).write_text(str(directory))
    place = link.resolve()
    if not may(account, "-x", place):
        raise ServerError(
            f"the user {account.pw_name}, who is to run PostgreSQL, can reach neither {directory}"
            f" nor {place}; start it in another directory, or as another user than root"
        )
    return place


def _remove_what_stands_in_for_nothing() -> None:
    """The directory that it stood in for has been removed, a temporary one for instance."""
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


def runnable(account: pwd.struct_passwd, programs: Path, place: Path) -> Path:
    """The programs of the wheel, or else a copy of them in ``place``, which the user can run."""
    postgres = programs / "postgres"
    if may(account, "-r", postgres) and may(account, "-x", postgres):
        return programs
    package = programs.parents[1]
    if programs.parent.name != "pginstall":
        raise ServerError(
            f"the user {account.pw_name} cannot run the programs in {programs}; let everybody"
            " reach them, or start PostgreSQL as another user than root"
        )
    found = postgres.stat()
    copy = place / f"programs-{found.st_mtime_ns:x}-{found.st_size:x}"
    if not copy.exists():
        unfinished = copy.with_suffix(".unfinished")  # we may be interrupted
        shutil.rmtree(unfinished, ignore_errors=True)
        for source in (package, package.with_name(f"{package.name}.libs")):
            shutil.copytree(source, unfinished / source.name)
        for path in (unfinished, *unfinished.rglob("*")):
            mode = path.stat().st_mode
            path.chmod(mode | stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0))
        unfinished.rename(copy)
    return copy / programs.relative_to(package.parent)
