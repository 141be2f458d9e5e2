"""The requests a client may send: OpenAI's chat and text completions, with vLLM's further fields and Triad's.

A field that Triad doesn't support is accepted with its neutral value, which asks for nothing, and is
otherwise an error that names it. OpenAI's hints are taken without effect; docs/api.md lists them.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import FailFast, Field, PlainValidator, model_validator

from replicas.answer_forms import GrammarFormat, ThinkingBudget, ToolUse
from replicas.messages import Prompt
from router.chat import Messages, TemplateFields
from router.completion import MAX_CHOICES, Completion
from router.fields import (
    INTEGRAL,
    Count,
    Hint,
    Neutral,
    PositiveCount,
    Replaced,
    TextPrompt,
    Unsupported,
    conflict,
    prompts,
)
from router.tools import ToolChoice, Tools, tool_use

MAX_CHAT_LOGPROBS = 20
MAX_TEXT_LOGPROBS = 5
DEFAULT_TEXT_TOKENS = 16
"""The max_tokens of a text completion that names none, as OpenAI has it."""


class ChatCompletionRequest(TemplateFields, Completion):
    prompt_field = "messages"

    messages: Annotated[Messages, FailFast()]
    max_completion_tokens: PositiveCount | None = None

    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_CHAT_LOGPROBS), INTEGRAL] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Any, Replaced("tools", [])] = None
    function_call: Annotated[Any, Replaced("tool_choice", "none")] = None
    truncation: Literal["auto", "disabled"] | None = None
    """`auto`: a chat that is longer than the context loses its first turns, as in OpenAI's Responses."""
    modalities: Annotated[Any, Neutral(["text"])] = None
    audio: Unsupported = None
    moderation: Unsupported = None
    prediction: Hint = None
    verbosity: str | None = None
    web_search_options: Hint = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        newer = self.max_completion_tokens
        if newer is not None and self.max_tokens not in (None, newer):
            raise conflict("max_tokens", "differs from max_completion_tokens; send one of them")
        return self

    @model_validator(mode="after")
    def _alternatives_of_something(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise conflict("top_logprobs", "only with logprobs: true")
        return self

    @model_validator(mode="after")
    def _tools_fit(self) -> Self:
        field, form = self.form
        if self.tool_use() is not None and isinstance(form, GrammarFormat):
            raise conflict(field, "does not go with tools; leave one out")
        return self

    @model_validator(mode="after")
    def _one_truncation(self) -> Self:
        if self.drops_turns and self.truncate_prompt_tokens is not None:
            raise conflict("truncation", "does not go with truncate_prompt_tokens; leave one out")
        return self

    @property
    def drops_turns(self) -> bool:
        return self.truncation == "auto"

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.thinking_token_budget is not None and self._asked_budget is not None:
            raise conflict("thinking_token_budget", "does not go with thinking.budget_tokens; leave one out")
        return self

    @property
    def _asked_budget(self) -> int | None:
        return None if self.thinking is None else self.thinking.budget_tokens

    @property
    def thinking_budget(self) -> ThinkingBudget | None:
        asked = self._asked_budget
        # Clients of Anthropic's send it by habit, to models that do not reason too.
        return super().thinking_budget if asked is None else ThinkingBudget(asked, needs_marks=False)

    @property
    def budget_field(self) -> str:
        return super().budget_field if self._asked_budget is None else "thinking.budget_tokens"

    def tool_use(self) -> ToolUse | None:
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def num_wanted(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_field(self) -> str:
        newer_alone = self.max_tokens is None and self.max_completion_tokens is not None
        return "max_completion_tokens" if newer_alone else "max_tokens"

    @property
    def num_prompt_chars(self) -> int:
        use = self.tool_use()
        return sum(message.num_chars for message in self.messages) + (0 if use is None else use.num_chars)

    def prompts_for_replica(self) -> tuple[Prompt, ...]:
        return (tuple(message.for_template() for message in self.messages),)


class CompletionRequest(Completion):
    prompt_field = "prompt"

    prompt: Annotated[
        tuple[TextPrompt, ...],
        PlainValidator(prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]),
    ]

    logprobs: Annotated[int, Field(ge=0, le=MAX_TEXT_LOGPROBS), INTEGRAL] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES), INTEGRAL] | None = None
    max_tokens: Count | None = None
    """0 makes none: with echo and logprobs, the prompt's log-probabilities alone."""
    echo: bool | None = None
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _best_of_is_n(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise conflict(
                "best_of",
                "choosing the best of more completions than are sent back is not supported; leave it out, "
                "and choose among n completions by their logprobs",
            )
        return self

    @property
    def num_wanted(self) -> int | None:
        return max(DEFAULT_TEXT_TOKENS, self.min_tokens or 0) if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @property
    def num_prompt_chars(self) -> int:
        return sum(map(len, self.prompt))

    def prompts_for_replica(self) -> tuple[Prompt, ...]:
        return self.prompt
