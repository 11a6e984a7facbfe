"""The site's settings, for Sphinx; `make docs` builds it."""

import sys
from configparser import ConfigParser
from pathlib import Path

import ziamath

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]  # notebooks.py, the package
parser = ConfigParser(delimiters=["="])
parser.read(HERE.parent.parent / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

from notebooks import linkcode_resolve  # noqa: E402, F401

project = settings["title"]
copyright = settings["copyright"]
release = settings["version"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "sphinx.ext.napoleon",
    "sphinx_codeautolink",
    "sphinx_copybutton",
    "sphinx_design",
    "notebooks",
]
exclude_patterns = ["_site", "cards.md", "html", "**/.ipynb_checkpoints"]
suppress_warnings = ["config.cache"]  # functions in the settings
smartquotes = False  # in prose alone, by MyST: not in docstrings
nitpicky = True
# other projects would take a network, and private names have no entry
nitpick_ignore_regex = [("py:.*", r"(?!selfflow\.).*|.*\._\w+")]

# notebooks
nb_execution_mode = "off"  # stored outputs are shown
nb_ipywidgets_js = {}  # would be fetched from another host
nb_merge_streams = True
nb_code_prompt_show = "Imports"  # the only cells that are folded
nb_code_prompt_hide = "Imports"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "smartquotes"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

# API
add_module_names = False
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
codeautolink_custom_blocks = {"python": "notebooks.only_ours"}
default_role = "code"  # what docstrings put between single backquotes
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

# appearance
html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["static", str(Path(ziamath.__file__).parent / "fonts")]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_sidebars = {"index": [], "**": ["sidebar-nav-bs"]}
html_context = {"default_mode": "auto"}
html_favicon = "static/mark.svg"
html_theme_options = {
    "logo": {
        "text": project,
        "image_light": "static/mark.svg",
        "image_dark": "static/mark.svg",
    },
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "collapse_navigation": True,  # else each page holds the whole book
    "navigation_depth": 2,
    "show_toc_level": 2,
    "search_bar_text": "Search",
    "search_as_you_type": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
copybutton_selector = "div.cell_input pre, section > div[class*=highlight-] pre"
