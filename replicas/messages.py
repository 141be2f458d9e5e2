"""The messages between the router and a replica: plain frozen records, cheap to pickle."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import field
from enum import StrEnum
from typing import Any

from policies.modes import Mode
from replicas.answer_forms import GrammarFormat, JsonFormat, ThinkingBudget, ToolUse
from replicas.errors import ErrorCode
from replicas.record import message, record

NUM_SEEDS = 2**63
"""The number of seeds, which are from 0 to one less."""


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@message
class SamplingParams:
    """The sampling options of a request."""

    max_tokens: int | None = None
    """The most tokens; None is up to the context's end, and 0 reads the prompt alone."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """1.0 filters nothing."""
    top_k: int = 0
    """0 filters nothing."""
    seed: int = 0
    """The random numbers of a request depend on its seed and the token's position alone, so the same request
    gives the same tokens in any batch, and in `ar` and `self_speculation` alike."""
    stop: tuple[str, ...] = ()
    """Strings that end the text, themselves left out unless includes_stop."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text as an end of text does, and that ignore_eos does not ignore."""
    includes_stop: bool = False
    """If true, the text has the stop string, or the token of stop_token_ids, that ended it."""
    shows_special_tokens: bool = False
    """If true, the text has the names of control tokens, but for an end of text that ends it."""
    ignore_eos: bool = False
    """If true, only max_tokens ends the text."""
    min_p: float = 0.0
    """Tokens less probable than min_p times the most probable one are left out."""
    presence_penalty: float = 0.0
    """Taken once off the logit of a token that the completion has already."""
    frequency_penalty: float = 0.0
    """Taken off the logit of such a token by count."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens seen, prompt included (multiplies negative ones), as in CTRL (arXiv
    1909.05858)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and what is added to its logit."""
    min_tokens: int = 0
    """No end of text comes before so many tokens."""
    logprobs: int | None = None
    """The number of most probable tokens to report with each token; 0 reports the token itself alone."""
    scores_prompt: bool = False
    """If true, the prompt's tokens are reported as well, with their log-probabilities; only with logprobs."""
    response_format: JsonFormat | GrammarFormat | None = None
    """The form that the completion is to have; None for any text."""
    tools: ToolUse | None = None
    """The tools that it may or must call; None for none."""
    thinking_token_budget: ThinkingBudget | None = None
    """The bound on its reasoning; None for none."""

    @property
    def needs_grammar(self) -> bool:
        """True if the answer has a form, or calls."""
        return self.response_format is not None or self.tools is not None

    @property
    def has_masks(self) -> bool:
        """True if a grammar may say at each token what may come."""
        return self.needs_grammar or self.thinking_token_budget is not None

    @property
    def grammar_field(self) -> str:
        """The name of the field that asks for the grammar."""
        if self.tools is not None:
            return "tools"
        return "thinking_token_budget" if self.response_format is None else "response_format"

    @property
    def form_decides_on_end(self) -> bool:
        """True if the completion ends where its form or its calls do; otherwise anywhere."""
        form = self.response_format
        return self.tools is not None or (form is not None and form.decides_on_end)

    @property
    def has_penalties(self) -> bool:
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return penalties != (0.0, 0.0, 1.0)

    @property
    def keeps_lossless(self) -> bool:
        """True if a mode chosen for it must be one whose output is AR's: what it asks for depends on the
        tokens before the one chosen, and in diffusion has a meaning of its own."""
        return self.has_penalties or self.logprobs is not None or self.has_masks


@message
class DecodingOptions:
    """The request's `decoding` field."""

    mode: Mode | None = None
    """None is `auto`: the replica's plan decides."""
    block_length: int | None = None
    """Overrides the plan's, for the modes that have one."""
    threshold: float | None = None
    """Overrides the plan's, for the modes that have one."""
    lossless: bool = False
    """If true, `auto` is kept to modes whose output is AR's."""
    max_steps: int | None = None
    """Denoising forwards that a block of diffusion may take; the last one fixes all that is left."""
    factor: float | None = None
    """Takes the place of the plan's threshold or factor (policies.modes); never beside a threshold."""
    risk: float | None = None
    """Takes the place of both; only for a checkpoint with a sampler of its own."""
    max_differing: float | None = None
    """If given, `auto` is kept to these modes and to settings of diffusion of whose answers at most this
    share differs from AR's, as measured of the checkpoint (policies.quality)."""
    trace: bool = False
    """If true, each Delta says which forwards gave its tokens."""

    @property
    def sets_parameters(self) -> bool:
        """True if the request itself says how its mode decodes, and so what a round of it brings."""
        return any(
            value is not None
            for value in (self.block_length, self.threshold, self.max_steps, self.factor, self.risk)
        )


Message = Mapping[str, Any]
"""A chat message as templates take it: `role` and `content`, which are strings, and where it has them
`name`, `reasoning_content`, `tool_call_id`, and `tool_calls`, each with `id`, `type` and `function`, whose
`arguments` are an object."""
Prompt = tuple[Message, ...] | str | tuple[int, ...]
"""Chat messages, text or token ids."""


@message
class TemplateOptions:
    """What a request says of how the chat template renders its messages."""

    add_generation_prompt: bool = True
    """If false, the text ends with the last message, where the assistant's turn does not begin."""
    continue_final_message: bool = False
    """If true, the text ends within the last message, which the completion goes on with."""
    kwargs: str = ""
    """Further variables of the template: a JSON object, or nothing."""


TEMPLATE_DEFAULTS = TemplateOptions()


@message
class GenerateRequest:
    """A request for completions: num_choices of each prompt.

    Choice k of prompt p has the index p * num_choices + k, and the seed of `sampling` plus k.
    """

    request_id: str
    channel_id: str
    """The token channel on which the events of this request go out."""
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    decoding: DecodingOptions = DecodingOptions()
    timeout_s: float | None = None
    """Seconds from submission after which it ends with DEADLINE_EXCEEDED; None is never."""
    num_choices: int = 1
    priority: int = 0
    """Lower goes first, among what waits at a replica."""
    trace_carrier: Mapping[str, str] = field(default_factory=dict)
    """The ingress's span, as headers of the propagators in force; empty without tracing."""
    cache_salt: str = ""
    """Prompts share the prefix cache with those of the same salt alone."""
    template: TemplateOptions = TEMPLATE_DEFAULTS
    truncate_prompt_tokens: int | None = None
    """The last so many tokens of each prompt are taken; -1: as many as leave room for max_tokens, or for one
    token where it is None."""
    drops_turns: bool = False
    """If true, a chat that is longer than the context loses its first turns (replicas.truncation)."""
    tokens_per_delta: int | None = None
    """The tokens of a choice from one Delta to the next, after a first Delta of one token; None leaves it to
    the steps."""
    return_token_ids: bool = False
    echo: bool = False
    """If true, the text of each choice begins with its prompt's."""

    @property
    def num_indices(self) -> int:
        return len(self.prompts) * self.num_choices


@message
class Accepted:
    """The request is accepted, and ends with exactly one Finished or Failed on its channel."""

    request_id: str
    num_prompt_tokens: int
    """Tokens of all its prompts, each counted once however many choices it has."""
    prompt_token_ids: tuple[tuple[int, ...], ...] = ()
    """Each prompt's token ids, where return_token_ids asks for them."""
    warning: str | None = None
    """What of the request is not kept to, as a part of a schema that is not strict; None where all is."""


@message
class Rejected:
    """The request is rejected: it did no work and has no events."""

    request_id: str
    code: ErrorCode
    message: str
    param: str | None = None
    """The name of the field at fault, if one is."""


@record
class TextLogprob:
    """A token's bytes, which may be part of a character only, and its log-probability by the model."""

    bytes: bytes
    logprob: float | None
    """The log-probability before penalties, temperature and filters; None for a prompt's first token."""
    offset: int = 0
    """The place where the token's text begins in the choice's text, in characters; 0 in `top`."""
    top: tuple["TextLogprob", ...] = ()


@message
class ToolCallDelta:
    """A piece of one call of a function."""

    index: int
    """The call's place among those of its choice."""
    arguments: str = ""
    """The next part of the arguments' JSON text."""
    call_id: str | None = None
    """Set, as is the name, on the first piece of a call alone."""
    name: str | None = None


@record
class TracedTokens:
    """Tokens of one choice that one forward let out."""

    mode: Mode
    forward: int
    """The number of the choice's forward, from 1; 0 is its prefill. In diffusion a position that was fixed
    earlier is let out by the forward that fixes the last one before it."""
    num_tokens: int
    text: str = ""
    """The part of the Delta's text that came with them; what had been held back comes with later ones."""


@record
class Delta:
    """New committed text of one choice; never taken back."""

    request_id: str
    text: str
    """Text of the answer itself."""
    num_tokens: int
    """Tokens taken since the last Delta; may be 0 when a held-back text comes free."""
    logprobs: tuple[TextLogprob, ...] = ()
    """Log-probabilities of the tokens whose text begins in this Delta, where the request asks for them. A
    token without text, as an end of text is, and one that only makes a stop string, have none."""
    index: int = 0
    reason: FinishReason | None = None
    """Set on the last Delta of a choice, and there is always a last one."""
    token_ids: tuple[int, ...] = ()
    """The num_tokens tokens, where return_token_ids asks for them."""
    stop_reason: str | int | None = None
    """On the last Delta, the stop string or the token of stop_token_ids that ended the text, if one did."""
    reasoning: str = ""
    """Text that came between the model's marks of reasoning."""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    trace: tuple[TracedTokens, ...] = ()
    """The tokens of num_tokens by forward, where the request asks for them."""

    @property
    def has_news(self) -> bool:
        """True if there is something to send besides the end."""
        return bool(self.text or self.reasoning or self.tool_calls)


@message
class DecodingReport:
    """The decoding of a request, in counts.

    A round of self-speculation is one forward. Prefill is none of these, and its token, the first, is
    counted to the mode that goes on from it.
    """

    tokens_by_mode: Mapping[Mode, int] = field(default_factory=dict)
    num_forwards: int = 0
    num_switches: int = 0
    rule: str = ""
    """The rule that chose the last mode ("request" where it was pinned, else the policy's name)."""
    replica_id: str = ""
    num_choices: int = 1
    """The number of choices whose counts are added up here."""

    @property
    def tokens_per_forward(self) -> float | None:
        """Tokens a forward after each choice's first token; None where the prefill brought all there are."""
        num_tokens = sum(self.tokens_by_mode.values()) - self.num_choices
        return num_tokens / self.num_forwards if self.num_forwards else None

    def __add__(self, later: "DecodingReport") -> "DecodingReport":
        """Adds up the reports of several choices; the rule is the later one's."""
        return DecodingReport(
            tokens_by_mode=Counter(self.tokens_by_mode) + Counter(later.tokens_by_mode),
            num_forwards=self.num_forwards + later.num_forwards,
            num_switches=self.num_switches + later.num_switches,
            rule=later.rule,
            replica_id=later.replica_id,
            num_choices=self.num_choices + later.num_choices,
        )


@message
class Finished:
    """All choices of a request have ended; the counts are for all of them."""

    request_id: str
    num_prompt_tokens: int
    """Tokens of its prompts, each counted once."""
    num_completion_tokens: int
    report: DecodingReport
    num_reused_tokens: int = 0
    """Prompt tokens that cost nothing, since their K/V was in the prefix cache from other requests."""
    num_reasoning_tokens: int | None = None
    """Completion tokens between marks of reasoning; None where the model has no such marks."""


@message
class Failed:
    """A request has ended without being complete; the counts are of what it had made by then."""

    request_id: str
    code: ErrorCode
    message: str
    report: DecodingReport | None = None
    """The decoding of all choices together, as in Finished; None where the replica was not there to say: a
    lost replica, or a request that made no token. Metrics count it like a Finished's."""
    num_completion_tokens: int = 0
    """Tokens of its texts, counted as Finished counts them."""


Event = Delta | Finished | Failed


@message
class ModelInfo:
    """The model that a replica serves."""

    name: str
    modes: tuple[Mode, ...]
    max_context: int
    """Prompt and completion together, in tokens."""
    vocab_size: int
    replica_id: str
    """Serve's unique id of the replica, by which the router addresses it and under which it publishes its
    load."""
    has_sampler: bool = False
    """True if the checkpoint has a learned sampler, so that `decoding` may have a risk."""
    max_prompt_chars: int | None = None
    """The length above which a text has more tokens than max_context, whatever it says; None: not known."""
