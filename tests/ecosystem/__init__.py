"""Tests against the real pyreft, pyvene and transformers; run by ``nox -s pyreft``."""
