"""What is collected where: tests/pyreft runs against the real packages, in the environment of nox's pyreft session."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("pyvene") else ["pyreft"]
