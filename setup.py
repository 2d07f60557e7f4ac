"""Package map: the folder kernels/ is installed as vit_fast.kernels; metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vit_fast", "vit_fast.*"]), "vit_fast.kernels"],
    package_dir={"vit_fast.kernels": "kernels"},
    package_data={"vit_fast": ["py.typed", "pretrained_cfgs.json"]},
)
