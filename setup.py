"""Puts the configs and the sample data into a built package, for `minigpt init`."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithStarter(build_py):
    """Builds the package with what a newcomer starts from; an editable install has the clone."""

    def run(self) -> None:
        """Copy the packages, then the folders, in which links become files."""
        super().run()
        if not self.editable_mode:
            for name in ("configs", "data"):
                target = Path(self.build_lib, "minigpt", "starter", name)
                fetched = shutil.ignore_patterns("public")
                shutil.copytree(name, target, dirs_exist_ok=True, ignore=fetched)


setup(cmdclass={"build_py": BuildWithStarter})
