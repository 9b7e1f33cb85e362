"""Everything is declared in pyproject.toml; this file is where the C++ extension of csrc/ will be, which needs code."""

from setuptools import setup

setup()
