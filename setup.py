"""Package map: kernels/ is installed as vit_fast.kernels, csrc/ as vit_fast.csrc; metadata is in pyproject.toml.

``VIT_FAST_BUILD_EXT=1 pip install --no-build-isolation .`` builds the CPU extension into the wheel, which is then for
one platform. Without it the wheel is pure Python, and neither torch nor a compiler is asked for.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
WITH_EXTENSION = os.environ.get("VIT_FAST_BUILD_EXT", "0")
if WITH_EXTENSION not in ("0", "1"):
    sys.exit(f"VIT_FAST_BUILD_EXT is {WITH_EXTENSION!r}, expected 0 or 1")


class BuildPy(build_py):
    """Copies the CPU library, built in the cache or found there, beside the modules: vit_fast/_lib/."""

    def run(self):
        super().run()
        target = (ROOT if self.editable_mode else Path(self.build_lib)) / "vit_fast" / "_lib"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        if WITH_EXTENSION == "1":
            sys.path.insert(0, str(ROOT))
            from csrc import build

            try:
                library = build.build("cpu").library
            except build.BuildError as error:
                sys.exit(f"vit-fast: the cpu extension cannot be built: {error}")
            target.mkdir(parents=True)
            for path in (library, library.with_suffix(".json")):
                shutil.copy2(path, target)


class PlatformDistribution(Distribution):
    """A package whose wheel is for one platform."""

    def has_ext_modules(self):
        return WITH_EXTENSION == "1"


class BdistWheel(bdist_wheel):
    """A wheel with the library fits every Python 3 of its platform."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(
    packages=[*find_packages(include=["vit_fast", "vit_fast.*"]), "vit_fast.kernels", "vit_fast.csrc"],
    package_dir={"vit_fast.kernels": "kernels", "vit_fast.csrc": "csrc"},
    package_data={
        "vit_fast": ["py.typed", "pretrained_cfgs.json"],
        "vit_fast.kernels": ["tuned/*.json"],
        "vit_fast.csrc": ["*.h", "*/*.h", "*/*.cuh", "*/*.cpp", "*/*.cu"],
    },
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
)
