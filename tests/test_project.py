"""Notebooks, modules and packages follow the rules of the project."""

import ast
import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

import pytest

from selfflow.analysis.factors import HEADS
from selfflow.analysis.judge import judge_for
from selfflow.data.sources import load
from selfflow.training.models import model, shipped_models

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*/*.ipynb"))
STUDIES = sorted((ROOT / "nbs/studies").glob("*.ipynb"))
MODULES = sorted(
    p for p in (ROOT / "selfflow").rglob("*.py") if not p.name.startswith("_")
)
# the folders that a folder may import; "" is the ground, "cli" what stands on top
LEFT_OF = {
    "": {""},
    "figures": {""},
    "method": {"", "figures"},
    "data": {"", "figures", "method"},
    "training": {"", "figures", "method", "data"},
    "analysis": {"", "figures", "method", "data", "training"},
    "report": {"", "figures", "method", "data", "training", "analysis"},
    "workbench": {"", "figures", "method", "data", "training", "analysis"},
    "cli": {
        "",
        "figures",
        "method",
        "data",
        "training",
        "analysis",
        "report",
        "workbench",
    },
}


def cells(path, kind):
    return [
        "".join(c["source"])
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == kind
    ]


def default_exp(path):
    return [
        m[1]
        for source in cells(path, "code")
        if (m := re.search(r"#\| default_exp ([\w.]+)", source))
    ]


def dotted(module):
    return ".".join(module.relative_to(ROOT).with_suffix("").parts)


def folder_of(path):
    "The folder of a notebook, as the rule calls it."
    folder = path.parent.name.partition("_")[2]
    return "" if folder == "ground" else folder


@functools.cache
def parsed(module):
    return ast.parse(module.read_text())


@functools.cache
def imports(module):
    """The names that a module of the package imports from others of the package:
    (module, name, its folder and order).
    """
    known = {dotted(path) for path in MODULES}
    imported = []
    for node in ast.walk(parsed(module)):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            package = dotted(module).split(".")[: -node.level]
            source = ".".join([*package, *filter(None, [node.module])])
        elif node.module.split(".")[0] == "selfflow":
            source = node.module
        else:
            continue
        for alias in node.names:
            full_name = f"{source}.{alias.name}"
            imported.append(
                (full_name, None) if full_name in known else (source, alias.name)
            )
    return imported


@functools.cache
def defined_in(module):
    "The names that the top level of a module defines."
    names = set()
    for node in parsed(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if target:
                parts = ast.walk(target)
                names |= {part.id for part in parts if isinstance(part, ast.Name)}
    return names


def tracked():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [
        ROOT / name
        for name in listed.stdout.split("\0")
        if name and (ROOT / name).is_file()
    ]


def test_one_notebook_one_module_and_no_stale_ones():
    for path in NOTEBOOKS:
        place = "" if folder_of(path) in ("", "cli") else f"{folder_of(path)}."
        assert default_exp(path) == [place + re.sub(r"^\d+_", "", path.stem)], path
    assert {dotted(p) for p in MODULES} == {
        f"selfflow.{default_exp(p)[0]}" for p in NOTEBOOKS
    }
    numbers = [(p.parent, p.stem[:2]) for p in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers)
    assert not any(default_exp(p) for p in STUDIES)


def test_a_folder_imports_only_to_its_left_and_inside_it_lower_numbers():
    home = {f"selfflow.{default_exp(p)[0]}": (folder_of(p), p.stem) for p in NOTEBOOKS}
    for module in MODULES:
        folder, number = home[dotted(module)]
        for source, name in imports(module):
            if source == "selfflow" and name == "__version__":
                continue
            other, lower = home[source]
            allowed = lower < number if other == folder else other in LEFT_OF[folder]
            assert allowed, (
                f"{dotted(module)} imports {name or 'all'} of {source}, which is not "
                "to its left"
            )


def test_names_are_public_and_imported_from_where_they_are_defined():
    for module in MODULES:
        for source, name in imports(module):
            if name is None or source == "selfflow":
                continue
            defined = defined_in(ROOT / f"{source.replace('.', '/')}.py")
            assert name in defined, (
                f"{dotted(module)} imports {name} from {source}, which does not define "
                "it"
            )
            assert not name.startswith("_"), (
                f"{dotted(module)} imports {name}, which is private to {source}"
            )


HEAVY = """
import sys, selfflow
selfflow.Config
print(sorted({"torch", "numpy", "pandas", "matplotlib"} & {*sys.modules}))
"""


def test_importing_selfflow_pulls_in_nothing_heavy():
    result = subprocess.run(
        [sys.executable, "-c", HEAVY], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
    from selfflow import Config, Run, train

    assert Config().name == "digits"
    assert (Run.__module__, train.__module__) == (
        "selfflow.training.run",
        "selfflow.training.loop",
    )
    with pytest.raises(AttributeError, match="nothing_such"):
        importlib.import_module("selfflow").nothing_such  # noqa: B018


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_modules_export_what_they_say_and_document_it(module):
    loaded = importlib.import_module(dotted(module))
    for name in loaded.__all__:
        value = getattr(loaded, name)
        if callable(value) and getattr(value, "__module__", "") == loaded.__name__:
            assert value.__doc__, f"{dotted(module)}.{name} has no docstring"


@pytest.mark.parametrize("path", NOTEBOOKS + STUDIES, ids=lambda p: p.stem)
def test_notebooks_have_the_form(path):
    book = json.loads(path.read_text())
    text = cells(path, "markdown")
    code = cells(path, "code")
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    assert text[0].startswith("# ")
    assert "\n> " in text[0]
    assert "widgets" not in book["metadata"] or "widget-view" in path.read_text(), (
        "the state of widgets that no cell shows"
    )
    assert path.stat().st_size < (500_000 if path in STUDIES else 200_000)
    if path not in STUDIES:
        assert any(
            "assert" in source for source in code if "#| export" not in source
        ), "a lesson asserts what it shows"
    for source in code:
        assert "import *" not in source
        assert "@patch" not in source
    outputs = [output for cell in book["cells"] for output in cell.get("outputs", [])]
    assert not any(
        output["output_type"] == "error" or output.get("name") == "stderr"
        for output in outputs
    )


@pytest.fixture
def copy(tmp_path):
    "A copy of the project that shares its environment."
    for name in ("nbs", "selfflow"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for name in ("judges", "fashion", "models"):
        shutil.copytree(ROOT / "data" / name, tmp_path / "data" / name)
    for name in (
        "README.md",
        "settings.ini",
        "setup.py",
        "pyproject.toml",
        "Makefile",
        "LICENSE",
        "MANIFEST.in",
    ):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (tmp_path / ".venv/.ready").touch()
    return tmp_path


def test_what_is_out_of_step_is_said_and_left_alone(copy):
    changed = {copy / "selfflow/method/flow.py", copy / "README.md"}
    for file in changed:
        file.write_text(file.read_text() + "# by hand\n")
    before = {file: file.read_text() for file in changed}
    done = subprocess.run(
        ["make", "-s", "check-step"], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "make export" in done.stdout
    assert "Only in" not in done.stdout
    differ = {line.split()[1] for line in done.stdout.splitlines() if "differ" in line}
    assert {copy / name for name in differ} == changed, "and all else is in step"
    after = {file: file.read_text() for file in changed}
    assert after == before, "a test never touches your files"


READ = """
import sys
from pathlib import Path
import selfflow
from selfflow.analysis import judge
from selfflow.data.sources import load
from selfflow.training.models import model, shipped_models
assert Path(selfflow.__file__).is_relative_to(sys.argv[1]), selfflow.__file__
judge.train_judge_for = None  # nothing is trained
shipped = {name: judge.judge_for(name) for name in judge.HEADS if name != "digits"}
shipped["data of fashion"] = load("fashion")
models = {name: model(name, "cpu").exported["sha256"] for name in shipped_models()}
print({name: one.fingerprint for name, one in shipped.items()} | models)
"""


def test_a_wheel_holds_the_same_judges_and_pictures_as_the_checkout(
    copy, tmp_path_factory
):
    def build(root):
        subprocess.run(
            [sys.executable, "setup.py", "-q", "bdist_wheel"],
            cwd=root,
            check=True,
            capture_output=True,
        )
        (wheel,) = (root / "dist").glob("*.whl")
        return wheel

    wheel = build(copy)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"],
        cwd=copy,
        check=True,
        capture_output=True,
    )
    shutil.unpack_archive(next((copy / "dist").glob("*.tar.gz")), copy / "unpacked")
    again = build(next((copy / "unpacked").iterdir()))
    inside = set(ZipFile(wheel).namelist())
    assert inside == set(ZipFile(again).namelist()), "a source distribution is complete"
    assert {str(path.relative_to(ROOT)) for path in MODULES} <= inside
    version = importlib.import_module("selfflow").__version__
    assert wheel.name.startswith(f"selfflow-{version}-")
    scripts = {
        str(path.relative_to(copy))
        for path in (copy / "selfflow/workbench/js").iterdir()
    }
    assert scripts and scripts <= inside, "what runs in the browser is there"
    installed = tmp_path_factory.mktemp("installed")
    shutil.unpack_archive(wheel, installed, "zip")
    result = subprocess.run(
        [sys.executable, "-c", READ, str(installed)],
        cwd=installed,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert result.returncode == 0, result.stderr
    shipped = {name: judge_for(name).fingerprint for name in HEADS if name != "digits"}
    shipped["data of fashion"] = load("fashion").fingerprint
    shipped |= {name: model(name).exported["sha256"] for name in shipped_models()}
    assert ast.literal_eval(result.stdout) == shipped, "and says nothing else"
    assert not list(installed.glob("data*"))


def test_pictures_and_links_exist():
    texts = {ROOT / "README.md": (ROOT / "README.md").read_text()}
    texts |= {
        path: "\n".join(cells(path, "markdown")) for path in [*NOTEBOOKS, *STUDIES]
    }
    for path, text in texts.items():
        for target in re.findall(r"\]\(([^)#\s]+)\)", text):
            assert target.startswith("https://") or (path.parent / target).exists(), (
                f"{path}: {target}"
            )


def test_packaging_reads_settings():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    assert (
        importlib.import_module("selfflow").__version__
        == settings["DEFAULT"]["version"]
    )
    assert (
        importlib.import_module("importlib.metadata").version("selfflow")
        == settings["DEFAULT"]["version"]
    )
    text = (ROOT / "pyproject.toml").read_text()
    assert "[project]" not in text
    assert "[build-system]" in text


def test_the_top_level_is_the_house():
    top = {p.relative_to(ROOT).parts[0] for p in tracked()}
    assert top <= {
        "nbs",
        "selfflow",
        "data",
        "tests",
        "settings.ini",
        "setup.py",
        "README.md",
        "Makefile",
        "pyproject.toml",
        "LICENSE",
        "MANIFEST.in",
        "CONTRIBUTING.md",
        ".ci",
        ".github",
        ".gitignore",
        ".gitattributes",
        ".editorconfig",
        ".pre-commit-config.yaml",
    }


def test_no_paths_of_one_machine_no_pickle_no_large_files():
    machine = re.compile(
        r"(?<![\w.])/(home|root|Users|work|tmp/bash_jobs)/|file:///|index-url"
    )
    pickled = re.compile(
        r"\bimport pickle|torch\.save\(|torch\.load\((?![^()]*\bweights_only=True\b)"
        r"|allow_pickle=True|trust_remote_code"
    )
    for path in tracked():
        shipped = ROOT / "data/fashion", ROOT / "data/models"
        large = any(path.is_relative_to(folder) for folder in shipped)
        large |= path.name == "_modidx.py"  # generated, and grows with the library
        largest = 5_000_000 if large else 700_000
        assert path.stat().st_size < largest, path
        if path.suffix in {
            ".py",
            ".ipynb",
            ".md",
            ".ini",
            ".toml",
            ".yml",
        } and path != Path(__file__):
            text = path.read_text()
            assert not machine.search(text), f"{path}: {machine.search(text)}"
            assert not pickled.search(text), f"{path}: {pickled.search(text)}"
