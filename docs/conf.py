"""The pages in docs/ as HTML: python -m sphinx --fail-on-warning docs DIR"""

import re

from docutils import nodes
from docutils.utils.math import latex2mathml

import cfg_jax

project = "cfg_jax"
release = cfg_jax.__version__
copyright = "the authors of cfg_jax"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
]
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
templates_path = ["_templates"]
smartquotes_action = "qe"  # two hyphens are a flag, no dash
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_title = "cfg_jax"
html_theme_options = {
    "source_repository": "https://github.com/OWNER/cfg_jax",
    "source_branch": "main",
    "source_directory": "docs/",
}

autosummary_generate = True  # a page for every module of the package, into docs/generated/
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True


def to_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are plain text with `code`, indented formulas and commands, and lists."""
    out, literal = [], False
    for before, line in zip(["", *lines], lines):
        indented = line.startswith("    ")
        if indented and not literal and not before.strip():
            out += ["::", ""]
            literal = True
        elif line.strip() and not indented:
            literal = False
        out.append(line if literal else _prose(line))
    lines[:] = out


def _prose(line):
    parts = re.split(r"`([^`]+)`", line)
    parts[::2] = [re.sub(r"([*|\\]|_\b|`)", r"\\\1", text) for text in parts[::2]]
    parts[1::2] = [f"``{code}``\\ " for code in parts[1::2]]  # a letter may follow
    return "".join(parts)


def skip(app, what, name, obj, skipped, options):
    """The fields of a NamedTuple have comments, and docstrings that say nothing."""
    return skipped or (getattr(obj, "__doc__", None) or "").startswith("Alias for field") or None


def visit_math(self, node):
    """Formulas are part of the page, which fetches nothing."""
    self.body.append(latex2mathml.tex2mathml(node.astext()))
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None))
    app.connect("autodoc-process-docstring", to_restructured_text)
    app.connect("autodoc-skip-member", skip)
