"""The marks between which a model reasons before it answers."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    begin: str
    end: str


MARKS: Mapping[str, ReasoningMarks] = {
    "think": ReasoningMarks("<think>", "</think>"),
    "mistral": ReasoningMarks("[THINK]", "[/THINK]"),
}


def marks_of(template: str | None, wanted: str = "auto") -> ReasoningMarks | None:
    """The marks of a model's reasoning; None where there are none.

    template: its chat template, by which "auto" goes. wanted: a name in MARKS, "auto" or "none".
    """
    if wanted == "none":
        return None
    if wanted != "auto":
        return MARKS[wanted]
    return next((marks for marks in MARKS.values() if marks.end in (template or "")), None)
