"""The packages of the distribution; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["van_deploy", "van_deploy.*"]),
        "van_deploy.calibration_sets",
        "van_deploy.recipes",
        "van_deploy.serve.templates",
    ]
)
