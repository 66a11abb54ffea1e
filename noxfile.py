"""The same targets of make with other versions: `nox --list`.

Each session has an environment of its own in .nox/. nox skips a Python that is not installed.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["tests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)
DJANGOS = [
    classifier.removeprefix("Framework :: Django :: ")
    for classifier in PYPROJECT["project"]["classifiers"]
    if classifier.startswith("Framework :: Django :: ")
]
#: Django 6.0 and newer need Python 3.12.
VERSIONS = [
    (python, django)
    for python in PYTHONS
    for django in DJANGOS
    if django == "5.2" or python not in ("3.10", "3.11")
]


def make(session: nox.Session, target: str, constraints: str = "") -> None:
    """`make TARGET` in the session's environment, with constraints for what pip installs."""
    environment = Path(session.virtualenv.location)
    file = environment / "constraints.txt"
    file.write_text(constraints)
    session.run(
        *("make", target, *session.posargs),
        env={"VENV": str(environment), "PIP_CONSTRAINT": str(file.absolute())},
        external=True,
    )


@nox.session
@nox.parametrize(("python", "django"), VERSIONS)
def tests(session: nox.Session, django: str) -> None:
    """`make quick`; for instance nox -s "tests(python='3.14', django='6.1')"."""
    make(session, "quick", f"Django~={django}.0")


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """`make quick` with the lowest versions that pyproject.toml allows."""
    session.install("uv")
    lowest = session.run(
        *("uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--all-extras"),
        *("--resolution=lowest-direct", "--python-version=3.10", "pyproject.toml"),
        silent=True,
    )
    make(session, "quick", str(lowest))


@nox.session
def lint(session: nox.Session) -> None:
    """`make lint`."""
    make(session, "lint")


@nox.session
def docs(session: nox.Session) -> None:
    """`make docs`."""
    make(session, "docs")
