"""What is collected where: some folders run against real packages, each in the environment of its own nox session."""

import importlib.util
import signal

NEEDS = {"pyreft": ("pyvene",), "ecosystem": ("geotorch", "transformers")}

collect_ignore = [
    folder for folder, packages in NEEDS.items() if not all(importlib.util.find_spec(name) for name in packages)
]

# A shell has what it runs in the background ignore Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
