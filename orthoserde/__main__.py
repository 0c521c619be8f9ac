"""``python -m orthoserde``, and the command ``orthoserde``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of the command line.

    Args:
        arguments: Those of the process by default.

    Returns:
        The exit code; 2 where typer or rich is not installed, which only the command line needs.
    """
    try:
        from orthoserde import cli  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        print('orthoserde: the command line needs typer and rich: pip install "orthoserde[cli]"', file=sys.stderr)
        return 2
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
