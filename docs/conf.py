"""How Sphinx reads and shows the pages that build.py puts together. Nothing here needs the network, now or when a page is read."""

import ast
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.pycode.ast import _UnparseVisitor

sys.path.insert(0, str(Path(__file__).parent))
from docments_reference import describe, skip  # noqa: E402  the path is set above

from genre_nb import __version__  # noqa: E402  the path is set above

# Sphinx 9 can't read a module with an f-string in an annotation, as in `Field(description=f"…")`.
_UnparseVisitor.visit_JoinedStr = lambda visitor, node: ast.unparse(node)

project, author, version, release = "genre_nb", "The genre_nb authors", __version__, __version__
copyright = "2026 onwards, The genre_nb authors"
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "index"
nb_execution_mode = "off"  # pages show the outputs that the notebooks keep
nb_merge_streams = True
nb_ipywidgets_js: dict = {}  # no page has widgets, and their scripts come from another host
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

viewcode_follow_imported_members = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"
default_role = "py:obj"
pygments_style = "a11y-high-contrast-light"

html_theme = "pydata_sphinx_theme"
html_title = html_short_title = "genre_nb"
html_static_path = [str(Path(__file__).parent / "_static")]
html_css_files = ["genre_nb.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_sidebars = {"index": [], "changelog": [], "security": [], "contributing": []}
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme_options = {
    "logo": {"text": "genre_nb"},
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 5,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def write_mathml(translator, node: nodes.math | nodes.math_block) -> None:
    "A formula as MathML, which browsers show without a script."
    block = isinstance(node, nodes.math_block)
    tex = re.sub(r"\\[Bb]igg?(?=\W)", "", node.astext())  # browsers size the signs themselves
    try:
        formula = tex2mathml(tex, as_block=block)
    except MathError as error:
        raise ValueError(f"{node.source}: can't show the formula {tex!r}: {error}") from error
    translator.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (write_mathml, None), (write_mathml, None))
    app.connect("autodoc-process-docstring", describe)
    app.connect("autodoc-skip-member", skip)
