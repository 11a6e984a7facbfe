"""Packaging: everything is read from settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
extras = {key.removesuffix("_requirements"): listed.split("\n")
          for key, listed in settings.items() if key.endswith("_requirements")}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    packages=[settings["lib_path"]],
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split("\n"),
    extras_require=extras,
    entry_points={
        "console_scripts": settings["console_scripts"].split("\n"),
        "nbdev": [f"{settings['lib_name']}={settings['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
