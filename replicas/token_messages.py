"""The messages by which a router has a replica turn text into tokens, and tokens into text."""

from dataclasses import dataclass

from replicas.answer_forms import ToolUse
from replicas.errors import ErrorCode
from replicas.messages import TEMPLATE_DEFAULTS, Prompt, TemplateOptions


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """The order for a prompt's token ids."""

    prompt: Prompt
    adds_special_tokens: bool
    """If true, they have the tokens that the tokenizer itself adds to a text."""
    template: TemplateOptions = TEMPLATE_DEFAULTS
    tools: ToolUse | None = None
    """The tools of which a chat's prompt tells."""
    returns_strings: bool = False


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A prompt's tokens."""

    token_ids: tuple[int, ...]
    strings: tuple[str, ...] | None = None
    """The vocabulary's own spelling of each, where it was asked for."""


@dataclass(frozen=True, slots=True)
class DetokenizeRequest:
    """The order for the text of token ids, names of control tokens included."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The replica's word that it can't do what was asked, and why."""

    code: ErrorCode
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class DescribeTokenizer:
    """The order for what the tokenizer is, as JSON text."""


TokenRequest = TokenizeRequest | DetokenizeRequest | DescribeTokenizer
TokenAnswer = Tokenized | str | Refused
"""What answers a TokenizeRequest, what the others, and what any."""
