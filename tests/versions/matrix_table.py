"""The table of a matrix of test runs, from the JUnit files that they leave in a folder.

``python -m tests.versions.matrix_table FOLDER`` prints it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree


def table(folder: Path) -> str:
    """A row for each file ``python-<version>-torch-<version>.xml``, by the version of torch."""
    lines = ["| torch | Python | passed | failed | skipped | seconds |", "|---|---|---|---|---|---|"]
    rows = []
    for path in folder.glob("python-*-torch-*.xml"):
        match = re.fullmatch(r"python-([\d.]+)-torch-([\d.]+)\.xml", path.name)
        suite = ElementTree.parse(path).getroot().find("testsuite")
        if match is None or suite is None:
            raise ValueError(f"{path}: expected the JUnit file of one run, called python-<version>-torch-<version>.xml")
        counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
        failed = counts["failures"] + counts["errors"]
        passed = counts["tests"] - failed - counts["skipped"]
        cells = [match[2], match[1], passed, failed, counts["skipped"], round(float(suite.attrib["time"]))]
        rows.append(([int(part) for part in match[2].split(".")], match[1], cells))
    return "\n".join([*lines, *("| " + " | ".join(map(str, cells)) + " |" for _, _, cells in sorted(rows))])


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
