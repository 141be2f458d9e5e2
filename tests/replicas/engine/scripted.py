"""A model without weights: outputs are hashes of what the page tables really hold.

The runner keeps token ids where a real one keeps K/V. So a sequence that reads a page of another, a
rejected draft, or a bidirectional forward's leavings gets other tokens than it would get alone.
"""

from zlib import crc32

from policies.modes import Mode
from replicas.engine.plan import ModelSpec, SegmentOutput, StepPlan

MASK = 1
EOS = 2
VOCAB = 61
GARBAGE = -7


def _hash(*parts: object) -> int:
    return crc32(repr(parts).encode())


def next_token(prefix: tuple[int, ...], eos_rate: int = 40) -> int:
    """AR's choice after this prefix; an end of text about once in eos_rate."""
    value = _hash("next", prefix)
    return EOS if value % eos_rate == 0 else 3 + value // eos_rate % (VOCAB - 3)


def denoise(prefix: tuple[int, ...], block: tuple[int, ...], adapter: bool) -> dict[int, tuple[int, float]]:
    """For each masked index of a block its token and probability: AR's own, often enough, less sure later."""
    guess: dict[int, tuple[int, float]] = {}
    rollout = prefix + block[:1]
    for index in range(1, len(block)):
        token = block[index]
        if token == MASK:
            value = _hash("denoise", prefix, block, index, adapter)
            token = next_token(rollout) if value % 4 else 3 + value % (VOCAB - 3)
            guess[index] = (token, (value % 1000) / 1000)
        rollout += (token,)
    return guess


class ScriptedRunner:
    def __init__(self, num_pages: int = 64, page_size: int = 4, max_context: int = 96):
        self._spec = ModelSpec(tuple(Mode), MASK, frozenset({EOS}), max_context, num_pages, page_size, 300)
        self._slots = [[GARBAGE] * page_size for _ in range(num_pages)]
        self.num_forwards = 0
        self.most_tokens = 0
        self.fail_next: Exception | None = None

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def run(self, plan: StepPlan) -> list[SegmentOutput]:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self.num_forwards += 1
        self.most_tokens = max(self.most_tokens, plan.num_tokens)
        assert len({segment.seq_id for segment in plan.segments}) == len(plan.segments)
        outputs = []
        for segment in plan.segments:
            size = self._spec.page_size
            prefix = tuple(self._slots[segment.pages[p // size]][p % size] for p in range(segment.start))
            for offset, token in enumerate(segment.token_ids):
                position = segment.start + offset
                kept = token if segment.causal else GARBAGE
                self._slots[segment.pages[position // size]][position % size] = kept
            if segment.causal:
                tokens = [next_token(prefix + segment.token_ids[: index + 1]) for index in segment.wanted]
                outputs.append(SegmentOutput(tuple(tokens), (1.0,) * len(tokens)))
            else:
                guess = denoise(prefix, segment.token_ids, segment.adapter)
                chosen = [guess[index] for index in segment.wanted]
                outputs.append(SegmentOutput(tuple(t for t, _ in chosen), tuple(p for _, p in chosen)))
        return outputs


def naive_ar(prompt: list[int], max_tokens: int, ignore_eos: bool = False) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(next_token((*prompt, *tokens)))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens


def naive_diffusion(
    prompt: list[int],
    max_tokens: int,
    block_length: int,
    threshold: float,
    max_context: int,
    max_steps: int | None = None,
) -> list[int]:
    """Block diffusion by the book, one block after another; ends at EOS or max_tokens."""
    tokens = [next_token(tuple(prompt))]
    while len(tokens) < max_tokens and EOS not in tokens:
        prefix = (*prompt, *tokens[:-1])
        block = [tokens[-1]] + [MASK] * (min(block_length, max_context - len(prefix)) - 1)
        num_steps = 0
        while MASK in block and EOS not in block[: block.index(MASK)]:
            num_steps += 1
            guess = denoise(prefix, tuple(block), adapter=False)
            surest = max(guess, key=lambda index: guess[index][1])
            for index, (token, prob) in guess.items():
                if index == surest or prob >= threshold or num_steps == max_steps:
                    block[index] = token
        tokens += block[1:]
        if MASK not in block:
            tokens.append(next_token((*prefix, *block)))
    cut = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
    return tokens[: min(cut, max_tokens)]
