from setuptools import setup  # everything else is in pyproject.toml

setup()
