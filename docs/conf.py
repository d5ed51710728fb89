"""The site: `python -m sphinx -W docs build/site`. Formulas become MathML here, so that a page needs no network."""

import re
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parents[1]))
import ddo_jax

project, author, release = "ddo_jax", "The ddo_jax authors", ddo_jax.__version__
copyright = "the ddo_jax authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "ddo_jax"
html_theme_options = {"source_repository": None, "top_of_page_buttons": []}
html_static_path, html_css_files = ["static"], ["site.css"]
html_show_sphinx = False
napoleon_use_rtype = False
autodoc_typehints = "none"  # docstrings give shapes and dtypes
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True


default_role = "code"


def _formulas_stand_as_written(app, what, name, obj, options, lines):
    """Indented paragraphs of a description are formulas: literal blocks, which lose no line and mean no markup."""
    for i in reversed(range(1, len(lines))):
        if lines[i].startswith("    ") and not lines[i - 1].strip() and not _in_section(lines[:i]):
            lines[i:i] = ["::", ""]


def _in_section(before):
    """Whether Args, Returns or their like have begun, whose own indentation means something else."""
    return any(line.endswith(":") and line[:-1].isalpha() and line[0].isupper() for line in before)


def _mathml(formula, display="inline"):
    return convert(re.sub(r"\\log(?![a-z])", r"\\log\\,", formula), display=display)  # it sets no space behind a name


def _inline(translator, node):
    translator.body.append(_mathml(node.astext()))
    raise nodes.SkipNode


def _display(translator, node):
    translator.body.append(f'<div class="math">{_mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app):
    app.connect("autodoc-process-docstring", _formulas_stand_as_written, priority=400)  # before napoleon
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_display, None))


html_math_renderer = "mathml"
