"""Settings of the site that sphinx-build makes of these pages: ``nox -s docs`` builds it, strictly, in build/site.

The pages are plain Markdown that a code host shows as it is. What only the site needs, its navigation, stands here.
Sphinx, and not MkDocs: that has had no release since August 2024, its Material theme ends in May 2027, and neither
reads the roles (:func:, :meth:) of the docstrings, which Sphinx follows and checks.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import orthoserde  # noqa: E402 - the package that stands beside these pages, whatever is installed

project = "orthoserde"
author = "The orthoserde maintainers"
copyright = author
version = release = orthoserde.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

#: The pages below each page, in groups with a caption (``""`` for none). Sphinx warns of a page that is nowhere.
NAVIGATION: dict[str, dict[str, list[str]]] = {
    "index": {
        "": ["Tutorial <tutorial/stop-and-resume>", "how-to/index", "reference/index", "explanation/index"],
    },
    "how-to/index": {
        "Every day": [
            "keep-checkpoints",
            "register-a-class",
            "find-traps",
            "prove-that-it-continues",
            "inspect-a-file",
            "load-other-files",
        ],
        "By symptom": [
            "missing-key-parametrizations",
            "non-contiguous-tensor",
            "loss-jumps-after-resume",
            "keys-matched-but-outputs-differ",
        ],
        "Space and serving": ["shrink-a-checkpoint", "skip-the-base", "save-in-shards", "convert-a-file"],
        "LoReFT and pyreft": ["train-loreft", "resume-loreft", "rescue-a-pyreft-checkpoint", "move-from-pyreft-save"],
        "Other libraries": ["use-geotorch"],
    },
    "reference/index": {
        "Python": [
            "api/save-and-load",
            "api/look-into-files",
            "api/live-models",
            "api/prove",
            "api/register",
            "api/loreft",
            "api/pyreft",
            "errors",
        ],
        "Command line": ["command-line"],
        "Files": ["file-format", "sources", "forms", "numerics"],
        "Versions": ["versions"],
    },
    "explanation/index": {
        "": ["why-state-dict-is-not-enough", "compact-bases", "architecture", "security", "performance"],
    },
}


def add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """Append what ``NAVIGATION`` has below a page, where a code host does not see it."""
    for caption, pages in NAVIGATION.get(page, {}).items():
        option = f":caption: {caption}\n" if caption else ""
        source[0] += "\n\n```{toctree}\n:hidden:\n" + option + "\n" + "\n".join(pages) + "\n```\n"


def shorten_aliases(
    app: Sphinx, what: str, name: str, documented: object, options: object, arguments: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """Name an alias by its name also within another type, where autodoc shows its own stand-in for it."""
    stand_in = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")
    return arguments and stand_in.sub(r"\1", arguments), result and stand_in.sub(r"\1", result)


def setup(app: Sphinx) -> None:
    """Register what Sphinx calls while it builds."""
    app.connect("source-read", add_navigation)
    app.connect("autodoc-process-signature", shorten_aliases)


# Strict: sphinx-build -W makes an error of each warning, and of each name in a docstring that leads nowhere.
nitpicky = True
# Types of Python and torch, and names that are this package's own but not public, are shown and lead nowhere.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|enum|numpy|os|pathlib|torch|typing)\..*"),
    (r"py:class", r"JSON|Path|Reference|Tensor|SaveArguments|orthoserde\.registry\.(\w+\.)*ModuleClass"),
]

exclude_patterns = ["examples"]
myst_heading_anchors = 4
# What is indented without a language is formulas, not Python.
highlight_language = "text"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"JSON": "JSON"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_ivar = False
napoleon_use_rtype = False

html_theme = "pydata_sphinx_theme"
html_title = "orthoserde"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
# A page that has no neighbours needs no list of them.
html_sidebars: dict[str, list[str]] = {"tutorial/*": []}
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 1,
    "header_links_before_dropdown": 5,
    "show_prev_next": True,
}
