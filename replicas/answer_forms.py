"""The forms that a completion may be ordered to have: JSON, other grammars, calls of tools."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class JsonFormat:
    """The order for a completion that is one JSON value which a schema allows."""

    schema: str
    """JSON text; properties come in its order."""
    best_effort: bool = False
    """If true, what of the schema can't be enforced is left out; otherwise it is an error."""
    whitespace: str | None = None
    """A pattern of the white space that may stand between tokens of JSON; None: one blank after each comma
    and colon, and none elsewhere."""

    @property
    def decides_on_end(self) -> bool:
        return True

    @property
    def param(self) -> str:
        """The field of which a fault in the schema is told."""
        return "response_format.json_schema.schema"


class GrammarKind(StrEnum):
    REGEX = "regex"
    CHOICE = "choice"
    """A JSON list of strings, one of which the completion is."""
    LARK = "grammar"
    """A grammar in llguidance's dialect of Lark."""
    STRUCTURAL_TAG = "structural_tag"
    """JSON: text in which triggers begin structures that have a schema."""
    WITHOUT_WORDS = "bad_words"
    """A JSON list of strings, none of which the completion has."""


@dataclass(frozen=True, slots=True)
class GrammarFormat:
    """The order for a completion of a form that is not one JSON schema."""

    kind: GrammarKind
    text: str

    @property
    def decides_on_end(self) -> bool:
        """True if the completion ends where the form does; otherwise anywhere."""
        return self.kind is not GrammarKind.WITHOUT_WORDS

    @property
    def param(self) -> str:
        """The field of which a fault in the form is told."""
        return "bad_words" if self.kind is GrammarKind.WITHOUT_WORDS else f"structured_outputs.{self.kind}"


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """A bound on the reasoning of a completion, behind which its closing mark is forced."""

    num_tokens: int
    """Of the reasoning, without its marks."""
    needs_marks: bool = True
    """If false, it asks nothing of a model that has no marks of reasoning; otherwise it is an error there."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask its caller to run."""

    name: str
    parameters: str
    """JSON text of the schema of its arguments, which are an object."""
    description: str | None = None
    strict: bool = False
    """If true, what of the schema can't be enforced is an error; otherwise it is left out."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The order for a completion that calls functions, or may."""

    tools: tuple[Tool, ...]
    """All that the prompt is to describe."""
    callable: frozenset[str]
    """Names of those that may be called."""
    is_required: bool = False
    """If true, the completion is one call or several; otherwise it may be text."""
    is_parallel: bool = True
    """If false, there is at most one call."""

    @property
    def num_chars(self) -> int:
        return sum(len(tool.name + tool.parameters + (tool.description or "")) for tool in self.tools)
