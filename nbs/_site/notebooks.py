"""A small extension of Sphinx: from nbdev's notebooks to pages that link to each other.

Notebooks are found by their files and put in order by their names, so that a new one
appears by itself: as a chapter, in its folder's list, and in the API.
"""

import ast
import inspect
import json
import os
import re
import textwrap
from functools import cache, partial
from importlib import import_module
from pathlib import Path

from docutils import nodes
from math_core import LatexToMathML
from nbformat.v4 import new_markdown_cell as markdown

TITLES = {"cli": "Command line"}  # of folders, where they are not their names
BADGE = "{bdg-secondary-line}`%s`"
FOLDER = "**This folder"  # begins the cell that describes a folder
READERS = re.compile(
    r"^\*(\w[^*\n]{,24})\*$", re.M
)  # the line that says who should read
FIELDS = re.compile(r"([a-z_]\w*(\(.*\)|(, \w+)*): .*(\n {4}.*)*(\n|$))+")
LATEX = LatexToMathML()
ROOT = Path(__file__).parent.parent.parent
REPOSITORY = os.environ.get("GITHUB_REPOSITORY", "selfflow/selfflow")
PLACES = {}  # of the public names: where in the book they are defined


class Notebook:
    """A notebook with its title, readers, folder and exported module."""

    def __init__(self, path):
        self.path = path
        self.book = json.loads(path.read_text(encoding="utf-8"))
        for cell in self.book["cells"]:
            cell["source"] = "".join(cell["source"])
        sources = [cell["source"] for cell in self.book["cells"]]
        lines = sources[0].split("\n")
        self.title = lines[0].strip("# ")
        self.summary = " ".join(line[2:] for line in lines if line[:2] == "> ")
        self.readers = READERS.findall(sources[0])
        self.folder = next((s for s in sources if s.startswith(FOLDER)), "")
        exports = re.findall(r"#\| default_exp (\S+)", "\n".join(sources))
        self.module = f"selfflow.{exports[0]}" if exports else None
        self.page = f"{path.parent.name}/{path.stem}"

    def constants(self):
        """Return the API's entries of public names that are no function or class."""
        module = import_module(self.module)
        values = {name: getattr(module, name) for name in module.__all__}
        return "".join(
            CONSTANT.format(module=self.module, name=name, value=text_of(value))
            for name, value in values.items()
            if is_constant(value)
        )

    def entry(self):
        """Return a line of a table of contents."""
        readers = "".join(f" {BADGE % who}" for who in self.readers)
        return f"[{self.title}](/{self.page}.ipynb){readers}\n: {self.summary}\n"

    def api_entry(self):
        """Return the same for the module that it exports: its names."""
        names = import_module(self.module).__all__
        links = ", ".join(f"{{py:obj}}`~{self.module}.{name}`" for name in names)
        name = self.module.rpartition(".")[2]
        return f"[{name}]({self.module}.md)\n: {self.summary}  \n  {links}\n"

    def places(self):
        """Return where on its page each public name of the module is defined."""
        return {
            f"{self.module}.{name}": f"{self.page}.html#{label_of(cell)}"
            for cell in self.book["cells"]
            if label_of(cell)
            for name in names_of(cell["source"])
        }


@cache
def notebook(path):
    return Notebook(path)


def label_of(cell):
    """Return the label of a cell that exports public names, or nothing."""
    exports = cell["cell_type"] == "code" and "#| export" in cell["source"]
    return f"cell-{cell['id']}" if exports and names_of(cell["source"]) else ""


def is_constant(value):
    """Return True for what automodule leaves out; methods of an object are it too."""
    known = inspect.isclass(value) or inspect.isroutine(value)
    return inspect.ismethod(value) or not known


def text_of(value):
    """Return a short value as it is written, and of others the kind."""
    if inspect.ismethod(value):
        return value.__qualname__
    text = repr(value)
    plain = isinstance(value, str | int | float | tuple)
    return text if plain and len(text) < 60 else f"a {type(value).__name__}"


def names_of(source):
    """Return the public names that a cell defines."""
    names = []
    for node in ast.parse(source).body:
        for target in getattr(node, "targets", [getattr(node, "target", node)]):
            names.append(getattr(target, "name", getattr(target, "id", "_")))
    return [name for name in names if not name.startswith("_")]


def imports_in(source):
    """Return the import statements of a cell: those of the package, and the others."""
    found = [node for node in ast.walk(ast.parse(source)) if hasattr(node, "names")]
    found = [node for node in found if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = [node for node in found if ast.unparse(node).split()[1][:8] == "selfflow"]
    return ours, [node for node in found if node not in ours]


def only_ours(source):
    """Return a cell, and what of it is searched for names to link: no others' names."""
    lines = source.split("\n")
    for node in imports_in(source)[1]:
        for number in range(node.lineno, node.end_lineno):
            lines[number] = ""
        lines[node.lineno - 1] = " " * node.col_offset + "pass"
    return source, "\n".join(lines)


def folders(source):
    """Return the folders of notebooks: the book's in their order, and the studies."""
    return [*sorted(source.glob("[0-9]_*")), source / "studies"]


def chapters(folder):
    """Return the notebooks of a folder in reading order.

    That is the order of their numbers, or in which the folder's description names them.
    """
    books = [notebook(path) for path in sorted(folder.glob("*.ipynb"))]
    text = next((book.folder for book in books if book.folder), "")
    named = re.findall(r"\((\w+\.ipynb)\)", text)

    def rank(book):
        if book.path.name[0].isdigit() or book.folder:
            return -1
        return named.index(book.path.name) if book.path.name in named else len(named)

    return sorted(books, key=rank), text


# ---- pages that are written ---------------------------------------------------------


MODULE = """
# {title}

Defined in the chapter [{chapter}](/{page}.ipynb).

```{{eval-rst}}
.. automodule:: {module}
{constants}
```
"""
CONSTANT = """
.. py:data:: {name}
   :module: {module}
   :value: {value}
"""


def toctree(*entries):
    return "\n".join(["```{toctree}", ":hidden:", "", *entries, "```", ""])


def write(path, *paragraphs):
    """Write a page; one that stays as it is need not be read again."""
    text = "\n\n".join(paragraphs)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_pages(app, config):
    """Write the first page of each folder, and the pages of the API."""
    source, api = Path(app.srcdir), Path(app.srcdir, "api")
    for folder in folders(source):
        name = folder.name.partition("_")[2] or folder.name
        title = TITLES.get(name, name.capitalize())
        books, text = chapters(folder)
        lines = [f"# {title}", text, toctree(*(book.path.stem for book in books))]
        lines += ["## Chapters", *(book.entry() for book in books)]
        write(folder / "index.md", *lines)

        books = [book for book in books if book.module]
        if not books:
            continue
        lines = [f"# {title}", f"Explained in [the book](/{folder.name}/index.md)."]
        lines += [book.api_entry() for book in books]
        lines += [toctree(*(book.module for book in books))]
        write(api / f"{folder.name}.md", *lines)
        for book in books:
            PLACES.update(book.places())
            text = MODULE.format(
                title=book.module.removeprefix("selfflow."),
                chapter=book.title,
                page=book.page,
                module=book.module,
                constants=book.constants(),
            )
            write(api / f"{book.module}.md", text)


# ---- a notebook as it is shown ------------------------------------------------------


def show(app, docname, source):
    """Turn the cells of a notebook into those that its page shows."""
    path = Path(app.env.doc2path(docname))
    if path.suffix != ".ipynb":
        return
    shown = notebook(path)
    cells = []
    for cell in shown.book["cells"]:
        if cell["cell_type"] == "code":
            cells += show_code(dict(cell))
        elif not cell["source"].startswith(FOLDER):
            text = re.sub(r"\]\(([^)]+)\)", partial(link, path.parent), cell["source"])
            cells.append({**cell, "source": text})
    if docname == app.config.root_doc:
        cards = Path(app.confdir, "cards.md").read_text(encoding="utf-8")
        first, rest = cells[0]["source"].split("\n## ", 1)
        cells[:1] = [markdown(first), markdown(cards), markdown(f"## {rest}")]
    else:
        code = [c["source"] for c in shown.book["cells"] if c["cell_type"] == "code"]
        preface = [ast.unparse(node) for c in code for node in imports_in(c)[0]]
        facts = [BADGE % who for who in shown.readers]
        if shown.module:
            facts.append(f"Module {{py:mod}}`{shown.module}`")
            names = ", ".join(import_module(shown.module).__all__)
            preface.append(f"from {shown.module} import {names}")
        preface = "\n".join(["```{autolink-preface}", ":level: file", "", *preface])
        title, summary, *rest = cells[0]["source"].split("\n\n")
        rest = [text for text in rest if not READERS.fullmatch(text)]
        head = [title, summary, f"{preface}\n```", " &nbsp; ".join(facts), *rest]
        cells[0]["source"] = "\n\n".join(head)
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    metadata["language_info"] = {"name": "python", "pygments_lexer": "python"}
    source[0] = json.dumps({**shown.book, "cells": cells, "metadata": metadata})


def link(folder, match):
    """Lead a link to a folder or a text that is no page of the site to GitHub."""
    target = (folder / match[1]).resolve()
    if not (target.is_dir() or target.suffix == ".md" and target.is_file()):
        return match[0]
    place = target.relative_to(ROOT).as_posix()
    return f"](https://github.com/{REPOSITORY}/tree/main/{place})"


def show_code(cell):
    """Return a code cell as it is shown, after its label if it has one."""
    label = label_of(cell)
    exports = "#| export" in cell["source"]
    cell["source"] = re.sub(r"^#\|.*\n?", "", cell["source"], flags=re.M).strip()
    if not cell["source"]:
        return []
    body = ast.parse(cell["source"]).body
    only_imports = all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)
    tags = {"export": exports, "hide-input": only_imports}
    cell["metadata"] = {"tags": [tag for tag, holds in tags.items() if holds]}
    cell["outputs"] = [show_output(dict(o)) for o in cell["outputs"]]
    cell["outputs"] = [output for output in cell["outputs"] if output]
    return [markdown(f"({label})=")] * bool(label) + [cell]


def show_output(output):
    """Return an output that needs neither a kernel nor another host, or nothing."""
    data = output.get("data", {})
    if any("widget-view" in kind for kind in data):
        return None  # a static figure of the same stands beside it
    if "image/webp" in data:
        picture = f"data:image/webp;base64,{''.join(data['image/webp']).strip()}"
        output["data"] = {"text/html": f'<img src="{picture}" alt="">'}
    return output


# ---- mathematics and links ----------------------------------------------------------


def visit_math(self, node):
    """Write a formula as MathML, which browsers read without a script."""
    is_block = isinstance(node, nodes.math_block)
    formula = LATEX.convert_with_local_state(node.astext(), displaystyle=is_block)
    self.body.append(f'<div class="formula">{formula}</div>' if is_block else formula)
    raise nodes.SkipNode


def linkcode_resolve(domain, info):
    """Return where in the book a name of the API is defined."""
    name = f"{info['module']}.{info['fullname'].split('.')[0]}"
    return f"../{PLACES[name]}" if name in PLACES else None


def skip(app, what, name, value, skipped, options):
    """Leave out what is described elsewhere, and methods that another project wrote."""
    if what == "module":
        return True if is_constant(value) else None
    foreign = not str(getattr(value, "__module__", "selfflow")).startswith("selfflow")
    field = "Alias for field" in str(getattr(value, "__doc__", ""))
    return True if foreign or field else None


def shorten(app, what, name, value, options, arguments, returns):
    """Drop the arguments that every protocol has; write a default so that it parses."""
    if getattr(value, "_is_protocol", False):
        return "", returns
    return arguments and arguments.replace("<factory>", "..."), returns


def read_docstring(app, what, name, value, options, lines):
    """Turn a docstring, which is plain text, into what Napoleon reads.

    Stars and bars mean themselves; paragraphs of `name: text` are arguments.
    """
    paragraphs = "\n".join(lines).split("\n\n")
    for index, text in enumerate(paragraphs):
        text = re.sub(
            r"`[^`]*`|[*|]|_(?!\w)", lambda m: m[0] if m[0][1:] else f"\\{m[0]}", text
        )
        if FIELDS.fullmatch(text.rstrip()):
            text = "Args:\n" + textwrap.indent(text, "    ")
        paragraphs[index] = text
    lines[:] = "\n\n".join(paragraphs).split("\n")


def add_uses(app, what, name, value, options, lines):
    """Add to a function or class where the book uses it."""
    if what in ("function", "class"):
        lines += ["", f".. autolink-examples:: {name}", "   :collapse:"]


def setup(app):
    app.connect("config-inited", write_pages)
    app.connect("source-read", show)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)
    app.connect("autodoc-process-docstring", add_uses)
    visitors = (visit_math, None)
    app.add_html_math_renderer("mathml", visitors, visitors)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
