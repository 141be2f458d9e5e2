"""Chooses the prompt tokens of a step, out of what its rounds leave of the budget."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping

from policies.cost import StepCost
from replicas.config import EngineConfig
from replicas.engine.decoders.round import SegmentRequest
from replicas.engine.sequence import Sequence

MIN_TOKENS = 16
"""Prompt tokens that a step takes, whatever its bound in ms, so that prompts always go on."""


class PrefillBudget:
    """The room for prompts in one step, after its rounds have been chosen."""

    def __init__(
        self, config: EngineConfig, cost: StepCost, num_tokens: int, rounds: Mapping[Sequence, SegmentRequest]
    ):
        """num_tokens: query tokens that the step may still take."""
        self._num_left = min(num_tokens, config.max_prefill_tokens) if rounds else num_tokens
        self._max_ms = config.max_step_ms if rounds else None
        self._cost = cost
        self._num_tokens = sum(len(request.token_ids) for request in rounds.values())
        self._num_segments = len(rounds)
        self._num_cached = sum(sequence.num_cached for sequence in rounds)
        self._has_none = True

    def room(self, num_cached: int = 0) -> int:
        """The number of tokens that a prompt may add, of which num_cached tokens are cached."""
        if self._num_left <= 0 or self._max_ms is None:
            return self._num_left

        def ms(count: int) -> float:
            num_tokens, num_segments = self._num_tokens + count, self._num_segments + 1
            return self._cost.ms(num_tokens, num_segments, self._num_cached + num_cached)

        within = bisect_right(range(1, self._num_left + 1), self._max_ms, key=ms)
        return max(within, min(MIN_TOKENS, self._num_left)) if self._has_none else within

    def take(self, sequence: Sequence) -> SegmentRequest | None:
        """Takes room for the next chunk of the sequence's prompt; None when there is none."""
        room = self.room(sequence.num_cached)
        if room <= 0:
            return None
        end = min(sequence.prefill_end, sequence.num_cached + room)
        tokens = tuple(sequence.tokens[sequence.num_cached : end])
        self._num_left -= len(tokens)
        self._num_tokens += len(tokens)
        self._num_segments += 1
        self._num_cached += sequence.num_cached
        self._has_none = False
        gives_first_token = sequence.num_completion_tokens == 0 and end == len(sequence.tokens)
        num_wanted = len(tokens) if sequence.is_scored else int(gives_first_token)
        wanted = tuple(range(len(tokens) - num_wanted, len(tokens)))
        return SegmentRequest(tokens, num_causal=len(tokens), adapter=False, wanted=wanted)

    def take_more(self, num_tokens: int) -> bool:
        """Takes room for tokens behind the chunk taken last; False, and nothing taken, where there is
        none."""
        room = self.room()
        if num_tokens > room:
            return False
        self._num_left -= num_tokens
        self._num_tokens += num_tokens
        return True


def is_coming(sequence: Sequence, running: Iterable[Sequence], page_size: int) -> bool:
    """True if a prefill under way will leave at least half of what this prompt still needs.

    So the choices of one prompt, and prompts with the same long beginning that come at once, wait until it is
    computed for the first of them.
    """
    cached, needed = sequence.num_cached, reusable_len(sequence)
    for other in running:
        if not other.is_prefilling or other.cache_salt != sequence.cache_salt:
            continue
        end, last_end = cached, min(needed, other.prefill_end)
        while (
            end + page_size <= last_end
            and other.tokens[end : end + page_size] == sequence.tokens[end : end + page_size]
        ):
            end += page_size
        if 0 < needed - cached <= 2 * (end - cached) and other.tokens[:cached] == sequence.tokens[:cached]:
            return True
    return False


def reusable_len(sequence: Sequence) -> int:
    """Leading tokens whose K/V may come from the cache; a first token needs its prompt's last logits, and a
    prompt that is scored all of them."""
    if sequence.is_scored:
        return 0
    return sequence.prefill_end - (1 if sequence.num_completion_tokens == 0 else 0)
