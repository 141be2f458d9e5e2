"""Clients as their makers ship them, against the server at TRIAD_CLIENTS_URL.

They are collected only where that is set, by `python -m tests.clients` in environments of their own: the
ordinary one has none of them.
"""

import os

import pytest

URL = "TRIAD_CLIENTS_URL"

collect_ignore_glob = [] if URL in os.environ else ["test_*.py"]


@pytest.fixture(scope="session")
def server() -> str:
    """The server's address, without a path."""
    return os.environ[URL]


@pytest.fixture(scope="session")
def base_url(server: str) -> str:
    """What OpenAI's clients take for their `base_url`."""
    return f"{server}/v1"
