"""The number of random cases a test draws: few by default, ten times as many with `--thorough`."""

from typing import Any

from hypothesis import settings

FACTOR = 10
_is_thorough = False


def be_thorough() -> None:
    """Has tests that are collected from now on draw more."""
    global _is_thorough
    _is_thorough = True


def num_cases(usual: int) -> int:
    """The number of cases of a loop over random ones, of which `usual` find what there is to find."""
    return usual * FACTOR if _is_thorough else usual


def examples(usual: int, **more: Any) -> settings:
    """Hypothesis's settings for a test of so many examples, without a deadline for each."""
    return settings(max_examples=num_cases(usual), deadline=None, **more)
