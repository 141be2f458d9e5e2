from collections.abc import Iterator

import pytest

from tests.loadtest.openai_server import OpenAiServer


@pytest.fixture
def openai_server() -> Iterator[OpenAiServer]:
    server = OpenAiServer()
    with server.running_on_loopback():
        yield server
