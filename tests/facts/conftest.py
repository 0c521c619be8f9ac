"""What each test of a fact has: the trap as the installed library shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

Trap = Callable[[bool, str], None]

#: The torch that the facts were measured with. There, a trap that is gone is an error; elsewhere it is told.
MEASURED_WITH = "2.13."

_gone: list[str] = []


@pytest.fixture
def trap(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Trap:
    """Record whether the installed libraries (still) do what a fact says of them.

    The half of a test that guards orthoserde runs either way: another torch may have mended what the fact complains of.
    """

    def observe(holds: bool, what: str) -> None:
        record_property(what, holds)
        if not holds:
            _gone.append(f"{request.node.name}: {what}")
            assert not torch.__version__.startswith(MEASURED_WITH), f"no longer so in torch {torch.__version__}: {what}"

    return observe


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _gone:
        terminalreporter.section(f"facts that torch {torch.__version__} does not show")
        for line in _gone:
            terminalreporter.line(line)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread: some bits depend on their number, and so does, on a busy machine, the time it takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20)
