"""Block diffusion: bidirectional forwards fix a block's positions, then one causal forward commits it.

Each denoising forward fixes, of the positions still masked, the most confident one and every other whose top
probability reaches the threshold, or as many as a factor lets it (Fast-dLLM's confidence-aware parallel
decoding, arXiv 2505.22618), or the checkpoint's own sampler within a risk (engine.decoders.learned_sampler).
Fixed positions never change, so the fixed prefix streams before the block is complete.

Where a block follows, its masks go behind the commit in the same forward, which is its first denoising, as
those of the first block go behind the prompt: each block costs a forward less. That one denoising is done
with the seed still masked, since the forward is what gives it; and so it is where a block has to begin in a
forward of its own, since the tokens must not depend on that.

A grammar cuts a block before the first token that it refuses: what is before is committed, and the commit's
causal logits, masked by the grammar, give the token in its place, as they do behind a whole block.
"""

from collections.abc import Mapping, Set
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from policies.modes import Mode
from replicas.engine.batch import SegmentOutput
from replicas.engine.decoders.learned_sampler import LearnedSampler, num_within
from replicas.engine.decoders.round import Round, RoundProgress, SegmentRequest
from replicas.engine.grammar import Grammar


@dataclass(frozen=True, slots=True)
class Denoising:
    """How the blocks of a sequence are filled in."""

    threshold: float | None
    factor: float | None
    risk: float | None
    """As of policies.modes.DecodePlan."""
    sampler: LearnedSampler | None
    """The checkpoint's; never None where there is a risk."""
    mask_token_id: int
    eos_token_ids: Set[int]
    """The tokens that end a text; empty when the request ignores them."""
    max_steps: int
    """Denoising forwards of a block at most; the last one fixes every position still masked."""
    adapter: bool
    """True if it is on while denoising; what is committed never has it."""
    hides_seed: bool
    """True if the first denoising is done with the seed masked, though it is known."""
    grammar: Grammar | None = None
    """What says where a block is cut; it has accepted the sequence's tokens."""
    tells_logprobs: bool = False
    """True if tokens are told with their log-probabilities, which the commit gives: none comes before it."""
    is_penalised: bool = False
    """True if penalties count the tokens that are fixed. A denoising then fixes no token twice, so that each
    is chosen in view of all others like it."""


class DiffusionRound(Round):
    """A round over one block.

    seed: None while the block before, or the prompt, which gives it, is not committed.
    """

    mode = Mode.DIFFUSION

    def __init__(self, start: int, seed: int | None, block_length: int, how: Denoising):
        self.start = start
        self._how = how
        self._steps_left = how.max_steps
        self._block: list[int | None] = [seed] + [None] * (block_length - 1)
        self._num_final = 1  # the seed and the fixed tokens right after it
        self._end = block_length  # of what is committed

    @property
    def num_untold(self) -> int:
        return self._num_final - 1 if self._how.tells_logprobs else 0

    def next_segment(self, following: int = 0) -> SegmentRequest:
        how, tokens = self._how, self._tokens
        if masked := self._masked:
            return SegmentRequest(tokens, 0, how.adapter, wanted=masked, fixed=self._counted)
        length = self._end
        wanted = tuple(range(length)) if how.tells_logprobs else (length - 1,)
        commit = SegmentRequest(tokens[:length], length, False, wanted, is_given=how.tells_logprobs)
        if not following or tokens[length - 1] in how.eos_token_ids:
            return commit
        return DiffusionRound(self.start + length, None, following, how).behind(commit)

    def apply_output(self, request: SegmentRequest, output: SegmentOutput) -> RoundProgress:
        if self._masked:
            tokens = self._denoised(output.token_ids, output.probs)
            return RoundProgress(() if self._how.tells_logprobs else tokens)
        num_told = request.wanted.index(self._end - 1)
        if len(output.token_ids) <= num_told:
            raise ValueError("the logits of a block's commit are not finite")
        tokens = output.token_ids[: num_told + 1]
        logprobs = output.logprobs(len(tokens))
        if request.successor is not None:
            behind = SegmentOutput(output.token_ids[num_told:], output.probs[num_told:])
            tokens = (*tokens[:-1], *request.successor.begin(behind, tokens[:-1]))
        return RoundProgress(tokens, logprobs, num_cached=self._end, done=True)

    def behind(self, request: SegmentRequest) -> SegmentRequest:
        """The request, whose last token gives this round's seed, with this block's masks behind it."""
        first, (masks, masked) = len(request.token_ids), (self._tokens, self._masked)
        wanted = (*request.wanted, *(first + index for index in masked if index))
        adapter = self._how.adapter
        return replace(
            request, token_ids=request.token_ids + masks, adapter=adapter, wanted=wanted, successor=self
        )

    def begin(self, output: SegmentOutput, untold: tuple[int, ...] = ()) -> tuple[int, ...]:
        seed, *guesses = output.token_ids
        self._block[0] = seed
        final = self._denoised(guesses, output.probs[1:], (*untold, seed))
        return (seed,) if self._how.tells_logprobs else (seed, *final)

    @property
    def _masked(self) -> tuple[int, ...]:
        return tuple(index for index, token in enumerate(self._block[: self._end]) if token is None)

    @property
    def _tokens(self) -> tuple[int, ...]:
        mask_token_id = self._how.mask_token_id
        tokens = [mask_token_id if token is None else token for token in self._block]
        if self._is_seed_hidden:
            tokens[0] = mask_token_id
        return tuple(tokens)

    @property
    def _is_seed_hidden(self) -> bool:
        how = self._how
        return how.hides_seed and self._steps_left == how.max_steps and len(self._block) > 1

    @property
    def _counted(self) -> tuple[int, ...]:
        """The fixed tokens that penalties count; an end of text is before no other token."""
        if not self._how.is_penalised:
            return ()
        eos = self._how.eos_token_ids
        return tuple(token for token in self._block[1:] if token is not None and token not in eos)

    def _denoised(
        self, token_ids: Seq[int], probs: Seq[float], untold: tuple[int, ...] = ()
    ) -> tuple[int, ...]:
        """Fixes some masked positions by what a denoising forward said of them; returns the final tokens.

        It may have said nothing of the last ones, or of all, where nothing could be sampled from a row.

        untold: tokens before these that the grammar has not accepted yet.
        """
        guesses = dict(zip(self._masked, token_ids, strict=False))
        trusts = self._trusts(tuple(guesses), probs)
        self._steps_left -= 1
        for index in self._chosen(guesses, trusts):
            self._block[index] = guesses[index]
        num_before = self._num_final
        self._take_final()
        if self._how.grammar is not None:
            self._obey(self._how.grammar, guesses, num_before, untold)
        if self._steps_left <= 0 and (masked := self._masked):
            self._end = masked[0]
        return self._tokens[num_before : self._num_final]

    def _trusts(self, guessed: Seq[int], probs: Seq[float]) -> Seq[float]:
        """How far each guess of these positions and probabilities is trusted: the higher, the sooner it is
        fixed."""
        if self._how.risk is None:
            return probs
        assert self._how.sampler is not None
        return self._how.sampler.log_odds(len(self._block), guessed, probs, self._is_seed_hidden)

    def _chosen(self, guesses: Mapping[int, int], trusts: Seq[float]) -> list[int]:
        """The positions to fix, of those guessed, which are trusted so far."""
        ranked = sorted(zip(guesses, trusts, strict=True), key=lambda item: -item[1])
        count = len(ranked) if self._steps_left <= 0 else max(1, self._num_sure([t for _, t in ranked]))
        surest = [index for index, _ in ranked[:count]]
        if not self._how.is_penalised:
            return surest
        seen: set[int] = set()
        chosen = []
        for index in surest:
            token = guesses[index]
            if token not in seen or token in self._how.eos_token_ids:
                chosen.append(index)
                seen.add(token)
        return chosen

    def _num_sure(self, trusts: Seq[float]) -> int:
        """The number of positions to fix of those trusted so far, the highest first."""
        threshold, factor, risk = self._how.threshold, self._how.factor, self._how.risk
        if risk is not None:
            return num_within(risk, trusts)
        if threshold is not None:
            return sum(prob >= threshold for prob in trusts)
        assert factor is not None
        ranked = enumerate(trusts, start=1)
        return max((count for count, p in ranked if (count + 1) * (1.0 - p) < factor), default=0)

    def _take_final(self) -> None:
        """Makes final what is fixed up to the first mask, or through an end of text.

        After an end of text nothing more is taken: the sequence ends there.
        """
        for token in self._block[self._num_final : self._end]:
            if token is None:
                return
            self._num_final += 1
            if token in self._how.eos_token_ids:
                self._end = self._num_final

    def _obey(
        self, grammar: Grammar, guesses: Mapping[int, int], num_before: int, untold: tuple[int, ...]
    ) -> None:
        """Cuts the block before the first token that the grammar refuses, and fixes those that it forces.

        What is looked at are the newly final tokens and the guess of the next one: a position that will be
        refused is not waited for. Where the grammar forces other tokens in its place, the block goes on with
        these.

        num_before: tokens that were final before.
        """
        first = 1 if self._how.tells_logprobs else num_before
        forced: tuple[int, ...] | None = None
        before: list[int | None] | None = None
        while forced != () and before != self._block:  # what is forced and refused at once changes nothing
            before = list(self._block)
            run = (*untold, *self._tokens[first : self._num_final])
            coming = guesses.get(self._num_final) if self._num_final < self._end else None
            tokens = run if coming is None else (*run, coming)
            num_allowed = grammar.num_allowed(tokens)
            if num_allowed < len(tokens):
                run = run[:num_allowed]
                self._num_final = self._end = first + len(run) - len(untold)
                self._block[self._end :] = [None] * (len(self._block) - self._end)
            at = self._num_final
            forced = before_mask(grammar.forced(run), self._how.mask_token_id)[: len(self._block) - at]
            if forced:
                self._end = len(self._block)
                self._block[at : at + len(forced)] = forced
                self._take_final()


def before_mask(tokens: tuple[int, ...], mask_token_id: int) -> tuple[int, ...]:
    """The tokens up to the mask of diffusion, which no text has, whatever a grammar names."""
    return tokens[: tokens.index(mask_token_id)] if mask_token_id in tokens else tokens
