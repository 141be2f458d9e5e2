import os

import pytest

from tests.thorough import FACTOR, be_thorough

# The models under test are tiny: more threads than one only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help=f"{FACTOR} times as many random cases a test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("thorough"):
        be_thorough()
