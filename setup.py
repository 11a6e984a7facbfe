"""Packaging: everything is read from settings.ini, which nbdev reads too."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# folders of data/ that are copied into a wheel, where selfflow.shipped finds them
SHIPPED = ("judges", "fashion", "models")
parser = ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
extras = {
    key.removesuffix("_requirements"): listed.split("\n")
    for key, listed in settings.items()
    if key.endswith("_requirements")
}


class Build(build_py):
    """The package and the files that come with it."""

    def run(self):
        super().run()
        if not self.editable_mode:  # a checkout has them in data/
            for name in SHIPPED:
                target = Path(self.build_lib, settings["lib_path"], "_shipped", name)
                shutil.copytree(ROOT / "data" / name, target, dirs_exist_ok=True)


setup(
    cmdclass={"build_py": Build},
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    packages=find_packages(include=["selfflow*"]),
    package_data={"selfflow.workbench": ["js/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split("\n"),
    extras_require=extras,
    entry_points={
        "console_scripts": settings["console_scripts"].split("\n"),
        "nbdev": [f"{settings['lib_name']}={settings['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
