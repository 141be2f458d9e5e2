"""What crosses between the router and a replica. Plain frozen records, cheap to pickle."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from policies.modes import Mode
from replicas.errors import ErrorCode


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """temperature 0 is greedy. top_k 0 and top_p 1.0 filter nothing.

    max_tokens: None is up to the context's end.
    seed: the random numbers of a request depend on its seed and the token's position alone, so the
    same request gives the same tokens in any batch, and in `ar` and `self_speculation` alike.
    stop: strings that end the text, themselves left out. ignore_eos: only max_tokens ends it.
    min_p: tokens less probable than min_p times the most probable one are left out.
    presence_penalty, frequency_penalty: taken off the logit of a token that the completion has already,
    once and by count; repetition_penalty divides the logits of tokens seen, prompt included (multiplies
    negative ones), as in CTRL (arXiv 1909.05858).
    logit_bias: (token id, what is added to its logit). min_tokens: no end of text before so many.
    logprobs: how many of the most probable tokens to report with each token, 0 for itself alone.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return penalties != (0.0, 0.0, 1.0)

    @property
    def needs_causal_order(self) -> str | None:
        """A field whose meaning needs every token before the one sampled, which diffusion has not got."""
        for name, neutral in _CAUSAL_FIELDS.items():
            if getattr(self, name) != neutral:
                return name
        return None


_CAUSAL_FIELDS = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logprobs": None,
}


@dataclass(frozen=True, slots=True)
class DecodingOptions:
    """The request's `decoding` field. mode None is `auto`: the replica's plan decides.

    block_length and threshold override the plan's, for the modes that have them; lossless keeps
    `auto` to modes whose output is AR's.
    """

    mode: Mode | None = None
    block_length: int | None = None
    threshold: float | None = None
    lossless: bool = False


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One completion to generate. The prompt is one of: chat messages, text, token ids.

    channel_id: the token channel on which the events of this request go out.
    timeout_s: seconds from submission after which it ends with DEADLINE_EXCEEDED; None is never.
    """

    request_id: str
    channel_id: str
    prompt: tuple[Mapping[str, str], ...] | str | tuple[int, ...]
    sampling: SamplingParams
    decoding: DecodingOptions = DecodingOptions()
    timeout_s: float | None = None
    traceparent: str | None = None
    """The ingress's span, by W3C trace context; None without tracing."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """Every accepted request ends with exactly one Finished or Failed on its channel."""

    request_id: str
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """The request did no work and has no events. param names the field at fault, if one is."""

    request_id: str
    code: ErrorCode
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class TextLogprob:
    """A token's text, its bytes and its log-probability by the model, before temperature and filters."""

    text: str
    bytes: bytes
    logprob: float
    top: tuple["TextLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New committed text; never taken back. num_tokens may be 0 when a held-back text comes free.

    logprobs: of the num_tokens tokens, where the request asks for them.
    """

    request_id: str
    text: str
    num_tokens: int
    logprobs: tuple[TextLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodingReport:
    """How a request was decoded. A draft and its verify are two forwards.

    Prefill is none of these, and its token, the first, is counted to the mode that goes on from it.

    rule: what chose the last mode ("request" where it was pinned, else the policy's name).
    """

    tokens_by_mode: Mapping[Mode, int] = field(default_factory=dict)
    num_forwards: int = 0
    num_switches: int = 0
    rule: str = ""
    replica_id: str = ""

    @property
    def tokens_per_forward(self) -> float:
        """Tokens a forward after the first token; 0 when there was no forward after it."""
        return (sum(self.tokens_by_mode.values()) - 1) / self.num_forwards if self.num_forwards else 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    request_id: str
    reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int
    report: DecodingReport
    num_reused_tokens: int = 0
    """Prompt tokens that cost nothing, since their K/V was in the prefix cache."""


@dataclass(frozen=True, slots=True)
class Failed:
    request_id: str
    code: ErrorCode
    message: str


Event = Delta | Finished | Failed


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a replica serves.

    replica_id: Serve's unique id of the replica, by which the router addresses it and under which
    it publishes its load.
    """

    name: str
    modes: tuple[Mode, ...]
    max_context: int
    """Prompt and completion together, in tokens."""
    vocab_size: int
    replica_id: str
