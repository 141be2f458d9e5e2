"""The requests a client may send: OpenAI's chat and text completions, and Triad's `decoding`.

A field that Triad doesn't support is accepted with its neutral value, which asks for nothing, and
is otherwise an error that names it. Nothing is ignored.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    FailFast,
    Field,
    PlainValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from policies.modes import LOSSLESS_MODES, MAX_BLOCK_LENGTH, Mode
from replicas.messages import NUM_SEEDS, DecodingOptions, JsonFormat, Prompt, SamplingParams
from router.fields import (
    INTEGRAL,
    MAX_INT32,
    Count,
    NoList,
    Off,
    PositiveCount,
    Strict,
    Text,
    TextPrompt,
    Unsupported,
    at_most,
    conflict,
    neutral,
    prompts,
)

MAX_STOPS = 16
MAX_STOP_LEN = 256
MAX_BIASES = 300
MAX_MESSAGES = 4096
MAX_METADATA = 16
MAX_PRIORITY = 1000
MAX_TIMEOUT_S = 24 * 3600.0
MAX_SCHEMA_LEN = 64 * 1024
MAX_CHOICES = 128
MAX_CHAT_LOGPROBS = 20
MAX_TEXT_LOGPROBS = 5


def _text(value: Any) -> Any:
    """The content, whose text parts are concatenated where it is a list."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise PydanticCustomError("unsupported_value", "Only content parts of type 'text' are supported.")
        text = part.get("text")
        if len(part) != 2 or not isinstance(text, str):
            raise PydanticCustomError("text_part", "A text part has a 'type' and a string 'text'")
        texts.append(text)
    return "".join(texts)


class Message(Strict):
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


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Off = None
    continuous_usage_stats: bool = False


class Decoding(Strict):
    """The way to decode; `auto` leaves it to the cluster's policy."""

    mode: Literal["auto", "ar", "diffusion", "self_speculation"] = "auto"
    block_length: Annotated[int, Field(ge=2, le=MAX_BLOCK_LENGTH), INTEGRAL] | None = None
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    lossless: bool = False
    max_steps: Annotated[int, Field(ge=1, le=MAX_BLOCK_LENGTH), INTEGRAL] | None = None
    trace: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        mode = self.pinned_mode
        if self.lossless and mode is Mode.DIFFUSION:
            raise conflict("lossless", "diffusion is not lossless; choose another mode")
        if self.block_length is not None and mode is Mode.AR:
            raise conflict("block_length", "ar decodes one token at a time")
        for field in ("threshold", "max_steps"):
            if getattr(self, field) is not None and (self.lossless or mode in LOSSLESS_MODES):
                raise conflict(field, "only diffusion has one")
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
            max_steps=self.max_steps,
            trace=self.trace,
        )


class JsonSchemaFormat(Strict):
    """A JSON schema that the answer keeps to."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None
    """False leaves out what of the schema can't be enforced; otherwise that is an error."""

    @field_validator("schema_")
    @classmethod
    def _is_json(cls, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema, if short enough and fit to be sent on: Python takes more for JSON than JSON is."""
        try:
            length = len(json.dumps(schema, allow_nan=False, ensure_ascii=False).encode())
        except RecursionError:
            raise PydanticCustomError("schema", "The schema is nested too deeply") from None
        except UnicodeEncodeError:
            raise PydanticCustomError("schema", "The schema has a lone surrogate") from None
        except ValueError as error:  # a number that overflows, or has thousands of digits
            message = "The schema can't be written as JSON: {error}"
            raise PydanticCustomError("schema", message, {"error": str(error)}) from None
        if length > MAX_SCHEMA_LEN:
            raise PydanticCustomError("schema", "A schema has at most {most} bytes", {"most": MAX_SCHEMA_LEN})
        return schema


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> Self:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise conflict("json_schema", "goes with type 'json_schema', and only with it")
        return self

    def json_format(self) -> JsonFormat | None:
        if self.json_schema is not None:
            return JsonFormat(json.dumps(self.json_schema.schema_), self.json_schema.strict is False)
        return JsonFormat('{"type": "object"}') if self.type == "json_object" else None


Stops = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LEN)]],
    Field(max_length=MAX_STOPS),
    at_most(MAX_STOPS),
]


def _token_id(text: str) -> str:
    if int(text) > MAX_INT32:
        raise PydanticCustomError("token_id", "A token id is at most {most}", {"most": MAX_INT32})
    return text


Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$"), AfterValidator(_token_id)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]],
    Field(max_length=MAX_BIASES),
    at_most(MAX_BIASES),
]
Metadata = Annotated[dict[str, str], Field(max_length=MAX_METADATA), at_most(MAX_METADATA)]


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Completion(Strict):
    """The fields of both kinds of completion."""

    prompt_field: ClassVar[str]
    """The name of the field that holds the prompt."""

    model: str
    max_tokens: PositiveCount | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT32), INTEGRAL] | None = None
    """-1 and 0 filter nothing."""
    seed: Annotated[int, Field(ge=-NUM_SEEDS, lt=NUM_SEEDS), INTEGRAL] | None = None
    stop: Annotated[Stops | None, BeforeValidator(_stops)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    min_tokens: Count | None = None
    logit_bias: LogitBias | None = None
    timeout_s: Annotated[float, Field(gt=0.0, le=MAX_TIMEOUT_S)] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY), INTEGRAL] | None = None
    decoding: Decoding | None = None
    response_format: ResponseFormat | None = None

    user: str | None = None
    safety_identifier: str | None = None
    metadata: Metadata | None = None
    store: Off = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), INTEGRAL] | None = None

    @model_validator(mode="after")
    def _usage_is_streamed(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "only with stream: true")
        if self.decoding is not None and self.decoding.trace and not self.stream:
            raise conflict("decoding.trace", "only with stream: true")
        return self

    @property
    def num_wanted(self) -> int | None:
        """The most tokens asked for; None is up to the context's end."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """The alternatives to report with each token; None reports no log-probabilities."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def num_prompt_chars(self) -> int:
        """The characters of all prompts; a token id counts as one."""
        raise NotImplementedError

    @property
    def limit_field(self) -> str:
        """The name of the field that gives num_wanted."""
        return "max_tokens"

    def name_sent(self, param: str) -> str | None:
        """This body's name for a replica's param, as far down as the body has it; None if not at all."""
        head, *rest = param.split(".")
        name = head.partition("[")[0]
        if name in ("messages", "prompt"):
            head = head.replace(name, self.prompt_field)
        elif name == "max_tokens":
            head = self.limit_field
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
            ignore_eos=self.ignore_eos,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            min_tokens=self.min_tokens or 0,
            logprobs=self.num_logprobs,
            response_format=None if self.response_format is None else self.response_format.json_format(),
        )

    def decoding_options(self) -> DecodingOptions:
        return (self.decoding or Decoding()).options()


class ChatCompletionRequest(Completion):
    prompt_field = "messages"

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: PositiveCount | None = None

    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_CHAT_LOGPROBS), INTEGRAL] | None = None
    tools: NoList = None
    tool_choice: Annotated[Any, neutral("none")] = None
    parallel_tool_calls: Annotated[Any, neutral(True)] = None
    functions: NoList = None
    function_call: Annotated[Any, neutral("none")] = None
    modalities: Annotated[Any, neutral(["text"])] = None
    service_tier: Annotated[Any, neutral("auto", "default")] = None
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
            raise conflict("max_tokens", "differs from max_completion_tokens; send one of them")
        return self

    @model_validator(mode="after")
    def _alternatives_of_something(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise conflict("top_logprobs", "only with logprobs: true")
        return self

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
        return sum(1 + len(message.content) for message in self.messages)

    def prompts_for_replica(self) -> tuple[Prompt, ...]:
        # OpenAI renamed `system` to `developer`; templates know the old name.
        messages = tuple(
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in self.messages
        )
        return (messages,)


def _sent(value: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """The part of a path that a body has; a list's items are taken on trust."""
    if not names or not isinstance(value, BaseModel):
        return names
    fields = {field.alias or name: name for name, field in type(value).model_fields.items()}
    inner = getattr(value, fields.get(names[0].partition("[")[0], ""), None)
    return () if inner is None else (names[0], *_sent(inner, names[1:]))


class CompletionRequest(Completion):
    prompt_field = "prompt"

    prompt: Annotated[
        tuple[TextPrompt, ...],
        PlainValidator(prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]),
    ]

    logprobs: Annotated[int, Field(ge=0, le=MAX_TEXT_LOGPROBS), INTEGRAL] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES), INTEGRAL] | None = None
    echo: Off = None
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
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_chars(self) -> int:
        return sum(map(len, self.prompt))

    def prompts_for_replica(self) -> tuple[Prompt, ...]:
        return self.prompt
