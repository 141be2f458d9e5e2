"""A model without weights: outputs are hashes of what the page tables really hold.

The runner keeps token ids where a real one keeps K/V. So a sequence that reads a page of another, a
rejected draft, or a bidirectional forward's leavings gets other tokens than it would get alone.
"""

from collections.abc import Sequence as Seq
from dataclasses import replace
from zlib import crc32

from policies.modes import DecodePlan, Mode
from replicas.engine.ahead import settled
from replicas.engine.batch import ModelSpec, ScheduledBatch, Segment, SegmentOutput
from replicas.engine.decoders.learned_sampler import LearnedSampler
from replicas.engine.grammar import Grammar
from replicas.engine.sequence import Progress
from replicas.messages import DecodingOptions
from tests.naive_diffusion import naive_diffusion as by_the_book
from tests.naive_sampler import SAMPLER, places_fixed

MASK = 1
EOS = 2
VOCAB = 61
GARBAGE = -7
PINNED = {
    "ar": DecodingOptions(Mode.AR),
    "diffusion": DecodingOptions(Mode.DIFFUSION, block_length=8, threshold=0.7),
    "factored": DecodingOptions(Mode.DIFFUSION, block_length=8, factor=1.0),
    "capped": DecodingOptions(Mode.DIFFUSION, block_length=8, threshold=0.7, max_steps=2),
    "self_speculation": DecodingOptions(Mode.SELF_SPECULATION, block_length=6),
    "lossless": DecodingOptions(lossless=True),
    "sampled": DecodingOptions(Mode.DIFFUSION, block_length=8, risk=0.7),
}


def _hash(*parts: object) -> int:
    return crc32(repr(parts).encode())


def next_token(prefix: tuple[int, ...], eos_rate: int = 40) -> int:
    """AR's choice after this prefix; an end of text about once in eos_rate."""
    value = _hash("next", prefix)
    return EOS if value % eos_rate == 0 else 3 + value // eos_rate % (VOCAB - 3)


def denoise(prefix: tuple[int, ...], block: tuple[int, ...], adapter: bool) -> dict[int, tuple[int, float]]:
    """For each masked index of a block its token and probability: AR's own, often enough, less sure later."""
    guess: dict[int, tuple[int, float]] = {}
    rollout = prefix
    for index, token in enumerate(block):
        if token == MASK:
            value = _hash("denoise", prefix, block, index, adapter)
            token = next_token(rollout) if value % 4 else 3 + value % (VOCAB - 3)
            guess[index] = (token, (value % 1000) / 1000)
        rollout += (token,)
    return guess


class ScriptedRunner:
    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 4,
        max_context: int = 96,
        sampler: LearnedSampler | None = SAMPLER,
    ):
        self._spec = ModelSpec(
            tuple(Mode), MASK, frozenset({EOS}), max_context, num_pages, page_size, 300, sampler=sampler
        )
        self._slots = [[GARBAGE] * page_size for _ in range(num_pages)]
        self.num_forwards = 0
        self.most_tokens = 0
        self.fail_next: Exception | None = None

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self.num_forwards += 1
        self.most_tokens = max(self.most_tokens, batch.num_tokens)
        assert len({segment.seq_id for segment in batch.segments}) == len(batch.segments)
        outputs = []
        for segment in batch.segments:
            size = self._spec.page_size
            prefix = tuple(self._slots[segment.pages[p // size]][p % size] for p in range(segment.start))
            for offset, token in enumerate(segment.token_ids):
                position = segment.start + offset
                kept = token if offset < segment.num_causal else GARBAGE
                self._slots[segment.pages[position // size]][position % size] = kept
            count = segment.num_causal
            causal, block = segment.token_ids[:count], segment.token_ids[count:]
            chosen = [
                (next_token(prefix + causal[: index + 1]), 1.0) for index in segment.wanted if index < count
            ]
            if segment.allowed:
                chosen = [
                    (nearest(token, mask), 1.0)
                    for (token, _), mask in zip(chosen, segment.allowed, strict=True)
                ]
            guess = denoise(prefix + causal, block, segment.adapter) if block else {}
            chosen += [guess[index - count] for index in segment.wanted if index >= count]
            outputs.append(SegmentOutput(tuple(t for t, _ in chosen), tuple(p for _, p in chosen)))
        return outputs


class ScriptedStep:
    """A step that a device has taken: what became of its segments, by sequence, or why it failed."""

    def __init__(self, made: dict[int, tuple[Segment, SegmentOutput]], error: Exception | None):
        self.made = made
        self._error = error

    def outputs(self, segments: Seq[Segment]) -> list[SegmentOutput]:
        if self._error is not None:
            raise self._error
        assert len({segment.seq_id for segment in segments}) == len(segments)
        for segment in segments:
            assert self.made[segment.seq_id][0] == segment, "host and device disagree"
        return [self.made[segment.seq_id][1] for segment in segments]


class Device:
    """Runs another runner's forwards as a device does, in the order in which they are begun.

    What a step that follows another is to be it finds out by itself, and tells nobody until it is asked.
    fails_early: an error comes when a forward is begun, and not when it is waited for.
    """

    def __init__(self, runner: ScriptedRunner, fails_early: bool = False):
        self._runner = runner
        self._fails_early = fails_early
        self.run = runner.run
        self.spec = replace(runner.spec, runs_ahead=True)

    def begin(self, batch: ScheduledBatch, before: ScriptedStep | None) -> ScriptedStep:
        segments = []
        for segment in batch.segments:
            if segment.follows is not None:
                followed, output = before.made[segment.seq_id] if before and before.made else (None, None)
                if followed is None or output is None:
                    return ScriptedStep({}, RuntimeError("what is before it has failed"))
                assert followed == segment.follows
                came = settled(segment, output)
                if came is None:
                    continue
                end = came.start + len(came.token_ids)
                assert end <= min(len(came.pages) * self.spec.page_size, self.spec.max_context)
                segment = came
            segments.append(segment)
        try:
            outputs = self._runner.run(ScheduledBatch(tuple(segments)))
        except Exception as error:
            if self._fails_early:
                raise
            return ScriptedStep({}, error)
        pairs = zip(segments, outputs, strict=True)
        return ScriptedStep({segment.seq_id: (segment, output) for segment, output in pairs}, None)

    def can_be_followed(self, segment: Segment) -> bool:
        return not (segment.allowed or segment.sampling.has_penalties or segment.sampling.has_masks)


def nearest(token: int, allowed: bytes | None) -> int:
    """The choice, or where the mask does not have it the next token after it that it has."""
    if allowed is None:
        return token
    mask = int.from_bytes(allowed, "little")
    return next(other % VOCAB for other in range(token, token + VOCAB) if mask >> other % VOCAB & 1)


class ScriptedGrammar(Grammar):
    """Neighbours differ modulo 3, the mask token never comes, and after so many tokens it is complete.

    An end of text may come after every fourth token. After every sixth one two tokens are forced.
    """

    def __init__(self, num_tokens: int):
        self._num_tokens = num_tokens
        self._accepted: tuple[int, ...] = ()

    @property
    def is_complete(self) -> bool:
        return len(self._accepted) >= self._num_tokens

    def masks(self, draft: Seq[int]) -> tuple[bytes | None, ...]:
        masks = [self._mask(self._accepted)]
        for count, token in enumerate(draft, start=1):
            may_come = int.from_bytes(masks[-1], "little") >> token & 1
            if not may_come or token == EOS or len(self._accepted) + count >= self._num_tokens:
                break
            masks.append(self._mask((*self._accepted, *draft[:count])))
        return tuple(masks)

    def num_allowed(self, tokens: Seq[int]) -> int:
        made = self._accepted
        for count, token in enumerate(tokens):
            is_over = len(made) >= self._num_tokens or EOS in made
            if is_over or not int.from_bytes(self._mask(made), "little") >> token & 1:
                return count
            made += (token,)
        return len(tokens)

    def mask_behind(self, tokens: Seq[int]) -> bytes:
        return self._mask((*self._accepted, *tokens))

    def forced(self, tokens: Seq[int]) -> tuple[int, ...]:
        forced: list[int] = []
        while EOS not in (made := (*self._accepted, *tokens, *forced)) and len(made) < self._num_tokens:
            mask = int.from_bytes(self._mask(made), "little")
            if mask.bit_count() > 1:
                break
            forced.append(mask.bit_length() - 1)
        return tuple(forced)

    def accept(self, token_id: int) -> None:
        assert int.from_bytes(self._mask(self._accepted), "little") >> token_id & 1, "not allowed"
        self._accepted += (token_id,)

    @staticmethod
    def _mask(accepted: tuple[int, ...]) -> bytes:
        if accepted and len(accepted) % 8 in (6, 7):
            return (1 << 3 + (accepted[-1] + 8) % (VOCAB - 3)).to_bytes(8, "little")
        bits = sum(1 << t for t in range(3, VOCAB) if not accepted or t % 3 != accepted[-1] % 3)
        if accepted and len(accepted) % 4 == 0:
            bits |= 1 << EOS
        return bits.to_bytes(8, "little")


def naive_ar(
    prompt: list[int], max_tokens: int, ignore_eos: bool = False, grammar: Grammar | None = None
) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(next_token((*prompt, *tokens)))
        if grammar is not None:
            tokens[-1] = nearest(tokens[-1], grammar.masks(())[0])
        if tokens[-1] == EOS and not ignore_eos:
            break
        if grammar is not None:
            grammar.accept(tokens[-1])
            if grammar.is_complete:
                break
    return tokens


def naive_diffusion(
    prompt: list[int],
    max_tokens: int,
    block_length: int,
    threshold: float,
    max_context: int,
    max_steps: int | None = None,
    overlaps: bool = True,
    factor: float | None = None,
    risk: float | None = None,
) -> list[int]:
    """Block diffusion by the book, one block after another; ends at EOS or max_tokens.

    overlaps: every block's first denoising is done with its seed masked.
    """
    tokens = [next_token(tuple(prompt))]
    while len(tokens) < max_tokens and EOS not in tokens:
        prefix = (*prompt, *tokens[:-1])
        block = [tokens[-1]] + [MASK] * (min(block_length, max_context - len(prefix)) - 1)
        num_steps = 0
        while MASK in block and EOS not in block[: block.index(MASK)]:
            num_steps += 1
            seen = [MASK, *block[1:]] if overlaps and num_steps == 1 else block
            guess = denoise(prefix, tuple(seen), adapter=False)
            guess.pop(0, None)
            surest = max(guess, key=lambda index: guess[index][1])
            ranked = sorted((prob for _, prob in guess.values()), reverse=True)
            sure = [p for n, p in enumerate(ranked, 1) if factor is not None and (n + 1) * (1 - p) < factor]
            least = threshold if factor is None else min(sure, default=2.0)
            trusted: list[int] = []
            if risk is not None:
                probs = {index: prob for index, (_, prob) in guess.items()}
                trusted = places_fixed(SAMPLER, risk, len(block), probs, overlaps and num_steps == 1)
                surest, least = trusted[0], 2.0
            for index, (token, prob) in guess.items():
                if index == surest or prob >= least or index in trusted or num_steps == max_steps:
                    block[index] = token
        tokens += block[1:]
        if MASK not in block:
            tokens.append(next_token((*prefix, *block)))
    cut = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
    return tokens[: min(cut, max_tokens)]


class ScriptedModel:
    """The scripted runner's choices, for tests.naive_diffusion."""

    def next_token(self, context: tuple[int, ...], allowed: bytes | None) -> int:
        token = next_token(context)
        return token if allowed is None else nearest(token, allowed)

    def guesses(
        self, prefix: tuple[int, ...], block: tuple[int, ...], counted: tuple[int, ...]
    ) -> dict[int, tuple[int, float]]:
        return denoise(prefix, block, adapter=False)


def formed_diffusion(
    prompt: list[int],
    max_tokens: int,
    options: DecodingOptions,
    grammar_len: int,
    max_context: int,
    overlaps: bool,
) -> list[int]:
    """Block diffusion in a ScriptedGrammar of so many tokens."""
    assert options.block_length is not None
    return by_the_book(
        ScriptedModel(),
        prompt,
        max_tokens,
        DecodePlan(Mode.DIFFUSION, options.block_length, options.threshold, options.factor, options.risk),
        mask=MASK,
        eos={EOS},
        max_context=max_context,
        grammar=lambda: ScriptedGrammar(grammar_len),
        max_steps=options.max_steps,
        overlaps=overlaps,
    )


def expected(
    kind: str, prompt: list[int], max_tokens: int, max_context: int, overlaps: bool = True
) -> list[int]:
    if PINNED[kind].mode is Mode.DIFFUSION:
        pinned = PINNED[kind]
        bounds = pinned.factor, pinned.risk
        return naive_diffusion(prompt, max_tokens, 8, 0.7, max_context, pinned.max_steps, overlaps, *bounds)
    return naive_ar(prompt, max_tokens)


def tokens_of(progress: list[Progress]) -> list[int]:
    return [token for made in progress for token in made.token_ids]
