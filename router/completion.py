"""The fields that chat and text completions share."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from replicas.answer_forms import GrammarFormat, GrammarKind, JsonFormat, ThinkingBudget, ToolUse
from replicas.messages import NUM_SEEDS, DecodingOptions, SamplingParams, TemplateOptions
from router.decoding import Decoding
from router.fields import (
    INTEGRAL,
    MAX_INT32,
    Count,
    Hint,
    Off,
    PositiveCount,
    Prompted,
    Strict,
    Text,
    at_most,
    conflict,
)
from router.formats import ResponseFormat, StructuredOutputs

MAX_STOPS = 16
MAX_STOP_LEN = 256
MAX_STOP_TOKEN_IDS = 128
MAX_BAD_WORDS = 64
MAX_BAD_WORD_LEN = 128
MAX_BIASES = 300
MAX_METADATA = 16
MAX_PRIORITY = 1000
MAX_TIMEOUT_S = 24 * 3600.0
MAX_CHOICES = 128
MAX_CACHE_SALT_LEN = 256


FORM_FIELDS = ("response_format", "structured_outputs", "bad_words")
"""Fields that give an answer its form, of which a request may have one."""


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Off = None
    continuous_usage_stats: bool | None = None


def _token_id(text: str) -> str:
    if int(text) > MAX_INT32:
        raise PydanticCustomError("token_id", "A token id is at most {most}", {"most": MAX_INT32})
    return text


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stops = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LEN)]],
    Field(max_length=MAX_STOPS),
    at_most(MAX_STOPS),
]
StopTokenIds = Annotated[list[Count], Field(max_length=MAX_STOP_TOKEN_IDS), at_most(MAX_STOP_TOKEN_IDS)]
BadWords = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=MAX_BAD_WORD_LEN)]],
    Field(max_length=MAX_BAD_WORDS),
    at_most(MAX_BAD_WORDS),
]
Temperature = Annotated[float, Field(ge=0.0, le=2.0)]
TopP = Annotated[float, Field(gt=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$"), AfterValidator(_token_id)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]],
    Field(max_length=MAX_BIASES),
    at_most(MAX_BIASES),
]
TokenBudget = Annotated[int, Field(ge=-1, le=MAX_INT32), INTEGRAL]
Metadata = Annotated[dict[str, str], Field(max_length=MAX_METADATA), at_most(MAX_METADATA)]


class Completion(Prompted):
    """The fields of both kinds of completion."""

    model: str | None = None
    """None for the one served."""
    max_tokens: PositiveCount | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT32), INTEGRAL] | None = None
    """-1 and 0 filter nothing."""
    seed: Annotated[int, Field(ge=-NUM_SEEDS, lt=NUM_SEEDS), INTEGRAL] | None = None
    stop: Annotated[Stops | None, BeforeValidator(_listed, json_schema_input_type=str | Stops | None)] = None
    stop_token_ids: StopTokenIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: PositiveCount | None = None
    """Tokens between two chunks of a choice, after the first, which has one token."""
    ignore_eos: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    min_tokens: Count | None = None
    logit_bias: LogitBias | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_INT32), INTEGRAL] | None = None
    """The last so many tokens of a prompt are taken; -1: as many as fit."""
    return_token_ids: bool | None = None
    cache_salt: Annotated[Text, Field(min_length=1, max_length=MAX_CACHE_SALT_LEN)] | None = None
    timeout_s: Annotated[float, Field(gt=0.0, le=MAX_TIMEOUT_S)] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY), INTEGRAL] | None = None
    decoding: Decoding | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    bad_words: BadWords | None = None
    thinking_token_budget: TokenBudget | None = None
    """Tokens of reasoning at most; -1 bounds none."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), INTEGRAL] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Hint = None

    @model_validator(mode="after")
    def _usage_is_streamed(self) -> Self:
        for field in ("stream_options", "stream_interval"):
            if getattr(self, field) is not None and not self.stream:
                raise conflict(field, "only with stream: true")
        if self.decoding is not None and self.decoding.trace and not self.stream:
            raise conflict("decoding.trace", "only with stream: true")
        return self

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        forms = [name for name in FORM_FIELDS if self._form_of(name) is not None]
        if len(forms) > 1:
            raise conflict(forms[-1], f"does not go with {forms[0]}; leave one out")
        return self

    @model_validator(mode="after")
    def _truncates_to_something(self) -> Self:
        if self.truncate_prompt_tokens == 0:
            raise conflict("truncate_prompt_tokens", "it leaves no prompt; send at least 1, or -1")
        return self

    def _form_of(self, field: str) -> JsonFormat | GrammarFormat | None:
        match field:
            case "response_format":
                return None if self.response_format is None else self.response_format.json_format()
            case "structured_outputs":
                return None if self.structured_outputs is None else self.structured_outputs.form()
        if not self.bad_words:
            return None
        return GrammarFormat(GrammarKind.WITHOUT_WORDS, json.dumps(self.bad_words))

    @property
    def form(self) -> tuple[str, JsonFormat | GrammarFormat | None]:
        """The field that gives the answer its form, and that form; None is any text."""
        for field in FORM_FIELDS:
            if (found := self._form_of(field)) is not None:
                return field, found
        return "response_format", None

    @property
    def num_wanted(self) -> int | None:
        """The most tokens asked for; None is up to the context's end."""
        return self.max_tokens

    @property
    def thinking_budget(self) -> ThinkingBudget | None:
        budget = self.thinking_token_budget
        return None if budget is None or budget < 0 else ThinkingBudget(budget)

    @property
    def num_logprobs(self) -> int | None:
        """The alternatives to report with each token; None reports no log-probabilities."""
        raise NotImplementedError

    @property
    def drops_turns(self) -> bool:
        """True if a chat that is too long loses its first turns."""
        return False

    @property
    def echoes(self) -> bool:
        """True if the answer begins with the prompt."""
        return False

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def template(self) -> TemplateOptions:
        return TemplateOptions()

    @property
    def limit_field(self) -> str:
        """The name of the field that gives num_wanted."""
        return "max_tokens"

    @property
    def budget_field(self) -> str:
        """The name of the field that gives thinking_budget."""
        return "thinking_token_budget"

    def name_sent(self, param: str) -> str | None:
        """This body's name for a replica's param, as far down as the body has it; None if not at all."""
        head, *rest = param.split(".")
        name = head.partition("[")[0]
        if name in ("messages", "prompt"):
            head = head.replace(name, self.prompt_field)
        elif name == "max_tokens":
            head = self.limit_field
        elif name == "thinking_token_budget":
            head, *rest = self.budget_field.split(".")
        elif name == "response_format" and self.form[0] != name:
            # The replica knows one name for all forms.
            head = self.form[0]
            rest = ["json"] if rest and head == "structured_outputs" else []
        return ".".join(_sent(self, (head, *rest))) or None

    def sampling(self, draw_seed: Callable[[], int]) -> SamplingParams:
        """The sampling parameters, by OpenAI's defaults where absent; draw_seed gives a seed not sent."""
        return SamplingParams(
            max_tokens=self.num_wanted,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            seed=(draw_seed() if self.seed is None else self.seed) % NUM_SEEDS,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(dict.fromkeys(self.stop_token_ids or ())),
            includes_stop=bool(self.include_stop_str_in_output),
            shows_special_tokens=self.skip_special_tokens is False,
            ignore_eos=bool(self.ignore_eos),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            min_tokens=self.min_tokens or 0,
            logprobs=self.num_logprobs,
            scores_prompt=self.echoes and self.num_logprobs is not None,
            response_format=self.form[1],
            thinking_token_budget=self.thinking_budget,
            tools=self.tool_use(),
        )

    def tool_use(self) -> ToolUse | None:
        """The tools that the model may call, and how; a plain text has none."""
        return None

    def decoding_options(self) -> DecodingOptions:
        return (self.decoding or Decoding()).options()


def _sent(value: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """The part of a path that a body has; a list's items are taken on trust."""
    if not names or not isinstance(value, BaseModel):
        return names
    fields = {field.alias or name: name for name, field in type(value).model_fields.items()}
    inner = getattr(value, fields.get(names[0].partition("[")[0], ""), None)
    return () if inner is None else (names[0], *_sent(inner, names[1:]))
