"""What crosses between the router and a replica. Plain frozen records, cheap to pickle."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from policies.modes import Mode
from replicas.errors import ErrorCode

NUM_SEEDS = 2**63
"""A seed is from 0 to one less."""


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class JsonFormat:
    """A completion that is one JSON value which a schema allows.

    schema: JSON text; properties come in its order. best_effort: what of it can't be enforced is left
    out; otherwise it is an error.
    """

    schema: str
    best_effort: bool = False


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
    response_format: what the completion is to be; None for any text.
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
    response_format: JsonFormat | None = None

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
    "response_format": None,
}


@dataclass(frozen=True, slots=True)
class DecodingOptions:
    """The request's `decoding` field. mode None is `auto`: the replica's plan decides.

    block_length and threshold override the plan's, for the modes that have them; lossless keeps
    `auto` to modes whose output is AR's.
    max_steps: denoising forwards a block of diffusion may take; the last one fixes all that is left.
    """

    mode: Mode | None = None
    block_length: int | None = None
    threshold: float | None = None
    lossless: bool = False
    max_steps: int | None = None

    @property
    def sets_parameters(self) -> bool:
        """The request itself says how its mode decodes, and so what a round of it brings."""
        return (self.block_length, self.threshold, self.max_steps) != (None, None, None)


Prompt = tuple[Mapping[str, str], ...] | str | tuple[int, ...]
"""Chat messages, text or token ids."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Completions to generate: num_choices of each prompt.

    Choice k of prompt p has the index p * num_choices + k, and the seed of `sampling` plus k.
    channel_id: the token channel on which the events of this request go out.
    timeout_s: seconds from submission after which it ends with DEADLINE_EXCEEDED; None is never.
    priority: lower goes first, among what waits at a replica.
    """

    request_id: str
    channel_id: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    decoding: DecodingOptions = DecodingOptions()
    timeout_s: float | None = None
    num_choices: int = 1
    priority: int = 0
    trace_carrier: Mapping[str, str] = field(default_factory=dict)
    """The ingress's span, as headers of the propagators in force; empty without tracing."""
    cache_salt: str = ""
    """Prompts share the prefix cache with those of the same salt alone."""

    @property
    def num_indices(self) -> int:
        return len(self.prompts) * self.num_choices


@dataclass(frozen=True, slots=True)
class Accepted:
    """Every accepted request ends with exactly one Finished or Failed on its channel.

    num_prompt_tokens: of all its prompts, each counted once however many choices it has.
    """

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
    """A token's bytes, which may be part of a character only, and its log-probability by the model.

    logprob: before penalties, temperature and filters.
    offset: where the token's text begins in the completion, in characters; 0 in `top`.
    """

    bytes: bytes
    logprob: float
    offset: int = 0
    top: tuple["TextLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New committed text of one choice; never taken back.

    num_tokens: taken since the last one; may be 0 when a held-back text comes free.
    logprobs: of the tokens whose text begins in this one, where the request asks for them. A token
    without text, as an end of text is, and one that only makes a stop string, have none.
    reason: set on the last one of a choice, and there is always a last one.
    """

    request_id: str
    text: str
    num_tokens: int
    logprobs: tuple[TextLogprob, ...] = ()
    index: int = 0
    reason: FinishReason | None = None


def joined(deltas: Sequence[Delta]) -> Delta:
    """Deltas of one choice, one after another, as one."""
    return Delta(
        deltas[0].request_id,
        "".join(delta.text for delta in deltas),
        sum(delta.num_tokens for delta in deltas),
        tuple(entry for delta in deltas for entry in delta.logprobs),
        deltas[0].index,
        deltas[-1].reason,
    )


@dataclass(frozen=True, slots=True)
class DecodingReport:
    """How a request was decoded. A draft and its verify are two forwards.

    Prefill is none of these, and its token, the first, is counted to the mode that goes on from it.

    rule: what chose the last mode ("request" where it was pinned, else the policy's name).
    num_choices: whose counts are added up here.
    """

    tokens_by_mode: Mapping[Mode, int] = field(default_factory=dict)
    num_forwards: int = 0
    num_switches: int = 0
    rule: str = ""
    replica_id: str = ""
    num_choices: int = 1

    @property
    def tokens_per_forward(self) -> float:
        """Tokens a forward after each choice's first token; 0 when there was no forward after it."""
        num_tokens = sum(self.tokens_by_mode.values()) - self.num_choices
        return num_tokens / self.num_forwards if self.num_forwards else 0.0

    def __add__(self, later: "DecodingReport") -> "DecodingReport":
        """Of several choices together; the rule is the later one's."""
        return DecodingReport(
            tokens_by_mode=Counter(self.tokens_by_mode) + Counter(later.tokens_by_mode),
            num_forwards=self.num_forwards + later.num_forwards,
            num_switches=self.num_switches + later.num_switches,
            rule=later.rule,
            replica_id=later.replica_id,
            num_choices=self.num_choices + later.num_choices,
        )


@dataclass(frozen=True, slots=True)
class Finished:
    """All choices of a request have ended; what it took for all of them.

    num_prompt_tokens: each prompt counted once.
    """

    request_id: str
    num_prompt_tokens: int
    num_completion_tokens: int
    report: DecodingReport
    num_reused_tokens: int = 0
    """Prompt tokens that cost nothing, since their K/V was in the prefix cache from other requests."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A request has ended without being complete; what it had made by then.

    report: how that was decoded, all choices together, as in Finished; None where the replica was not
    there to say: a lost replica, or a request that made no token. Metrics count it like a Finished's.
    num_completion_tokens: tokens of its texts, counted as Finished counts them.
    """

    request_id: str
    code: ErrorCode
    message: str
    report: DecodingReport | None = None
    num_completion_tokens: int = 0


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
    max_prompt_chars: int | None = None
    """A text of more characters has more tokens than max_context, whatever it says; None: not known."""
