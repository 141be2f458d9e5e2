"""Stores for tests in which Redis is there."""

from policies.control.store import LoadStore


def patient_store(url: str, app: str = "triad") -> LoadStore:
    """A store whose limits of time a busy machine does not reach."""
    return LoadStore(url, app, connect_timeout_s=20.0, command_timeout_s=20.0)
