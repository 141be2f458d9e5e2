"""What a client may send: OpenAI's chat and text completions, and Triad's `decoding`.

A field that Triad doesn't support is accepted with its neutral value, which asks for nothing, and
is otherwise an error that names it. Nothing is ignored.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from policies.modes import LOSSLESS_MODES, MAX_BLOCK_LENGTH, Mode
from replicas.messages import DecodingOptions, SamplingParams

MAX_STOPS = 16
MAX_STOP_LEN = 256
MAX_BIASES = 300
MAX_TIMEOUT_S = 24 * 3600.0
_MAX_SEED = 2**63

ChatPrompt = tuple[dict[str, str], ...]
"""Messages as the replica's chat template takes them: role and content."""


def _neutral(*values: Any) -> AfterValidator:
    """Accepts null and the given values; anything else asks for what Triad can't do."""

    def check(value: Any) -> None:
        if value is not None and not any(_same(value, known) for known in values):
            only = f" Leave it out or send {values[0]!r}." if values else ""
            message = "This parameter is not supported.{only}"
            raise PydanticCustomError("unsupported_parameter", message, {"only": only})

    return AfterValidator(check)


def _same(value: Any, known: Any) -> bool:
    """Equal, where 1.0 is 1 but true isn't."""
    if isinstance(value, bool) or isinstance(known, bool):
        return value is known
    return bool(value == known)


Unsupported = Annotated[Any, _neutral()]
NoList = Annotated[Any, _neutral([])]
Off = Annotated[Any, _neutral(False)]
Zero = Annotated[Any, _neutral(0)]
One = Annotated[Any, _neutral(1)]


def _unicode(text: str) -> str:
    """JSON can carry a lone surrogate; no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "The text has a lone surrogate") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _text(value: Any) -> Any:
    """Content given as a list of text parts is their concatenation."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise PydanticCustomError("unsupported_value", "Only content parts of type 'text' are supported.")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError("text_part", "A text part has a 'type' and a string 'text'")
        texts.append(part["text"])
    return "".join(texts)


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_text)]
    # What an answer's message carries, so that it can be sent back as it came.
    name: Unsupported = None
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_call_id: Unsupported = None
    tool_calls: NoList = None
    annotations: NoList = None


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Off = None


class Decoding(_Strict):
    """How to decode; `auto` leaves it to the cluster's policy."""

    mode: Literal["auto", "ar", "diffusion", "self_speculation"] = "auto"
    block_length: Annotated[int, Field(ge=2, le=MAX_BLOCK_LENGTH)] | None = None
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    lossless: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        mode = self.pinned_mode
        if self.lossless and mode is Mode.DIFFUSION:
            raise _conflict("lossless", "diffusion is not lossless; choose another mode")
        if self.block_length is not None and mode is Mode.AR:
            raise _conflict("block_length", "ar decodes one token at a time")
        if self.threshold is not None and (self.lossless or mode in LOSSLESS_MODES):
            raise _conflict("threshold", "only diffusion has one")
        return self

    @property
    def pinned_mode(self) -> Mode | None:
        return None if self.mode == "auto" else Mode(self.mode)

    def options(self) -> DecodingOptions:
        return DecodingOptions(
            mode=self.pinned_mode,
            block_length=self.block_length,
            threshold=self.threshold,
            lossless=self.lossless,
        )


def _conflict(field: str, why: str) -> PydanticCustomError:
    """Of one field with another; an error of the whole object says by `field` which one to change."""
    return PydanticCustomError("conflict", "{why}", {"field": field, "why": why})


Stops = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LEN)]], Field(max_length=MAX_STOPS)
]


Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]], Field(max_length=MAX_BIASES)
]


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Completion(_Strict):
    """The fields of both kinds of completion."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-_MAX_SEED, lt=_MAX_SEED)] | None = None
    stop: Annotated[Stops | None, BeforeValidator(_stops)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=2.0)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    logit_bias: LogitBias | None = None
    timeout_s: Annotated[float, Field(gt=0.0, le=MAX_TIMEOUT_S)] | None = None
    decoding: Decoding | None = None

    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    store: Off = None
    n: One = None

    @model_validator(mode="after")
    def _usage_is_streamed(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _conflict("stream_options", "only with stream: true")
        return self

    @property
    def num_wanted(self) -> int | None:
        """Tokens asked for at most; None is up to the context's end."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, draw_seed: Callable[[], int]) -> SamplingParams:
        """OpenAI's defaults where a field is absent; draw_seed gives a seed where none was sent."""
        return SamplingParams(
            max_tokens=self.num_wanted,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=(draw_seed() if self.seed is None else self.seed) % _MAX_SEED,
            stop=tuple(self.stop or ()),
            ignore_eos=self.ignore_eos,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            min_tokens=self.min_tokens or 0,
        )

    def decoding_options(self) -> DecodingOptions:
        return (self.decoding or Decoding()).options()


class ChatCompletionRequest(_Completion):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    logprobs: Off = None
    top_logprobs: Zero = None
    tools: NoList = None
    tool_choice: Annotated[Any, _neutral("none")] = None
    parallel_tool_calls: Annotated[Any, _neutral(True)] = None
    functions: NoList = None
    function_call: Annotated[Any, _neutral("none")] = None
    response_format: Annotated[Any, _neutral({"type": "text"})] = None
    modalities: Annotated[Any, _neutral(["text"])] = None
    service_tier: Annotated[Any, _neutral("auto", "default")] = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    prompt_cache_key: Unsupported = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        newer = self.max_completion_tokens
        if newer is not None and self.max_tokens not in (None, newer):
            raise _conflict("max_tokens", "differs from max_completion_tokens; send one of them")
        return self

    @property
    def num_wanted(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def prompt_for_replica(self) -> ChatPrompt:
        # OpenAI renamed `system` to `developer`; templates know the old name.
        return tuple(
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in self.messages
        )


def _prompt(value: Any) -> str | tuple[int, ...]:
    """One prompt: text or token ids, alone or in a list of one."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, list) and any(isinstance(item, str | list) for item in value):
        raise PydanticCustomError("unsupported_value", "Only one prompt a request is supported.")
    if isinstance(value, list) and value and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    if isinstance(value, str):
        return _unicode(value)
    raise PydanticCustomError("prompt", "A prompt is a string or a list of token ids")


class CompletionRequest(_Completion):
    prompt: Annotated[
        str | tuple[int, ...], PlainValidator(_prompt, json_schema_input_type=str | list[int] | list[str])
    ]

    logprobs: Unsupported = None
    best_of: One = None
    echo: Off = None
    suffix: Unsupported = None

    def prompt_for_replica(self) -> str | tuple[int, ...]:
        return self.prompt
