"""Ways to raise diffusion's tokens a forward, and the answers they lose: `python -m benchmarks.diffusion`.

Counts, not times. Ways to choose which positions a denoising forward fixes, and ways to commit before a block
is complete or to look past its end, each on the same held-out prompts of the embedded checkpoint's task
families. Exact: the family's own checker accepts the answer. Forwards are all after the prefill, commits
among them; rows are the query tokens of a forward.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import ceil
from operator import mul
from pathlib import Path

from benchmarks.modes import CHECKPOINT
from replicas.engine.batch import ScheduledBatch, Segment, SegmentOutput
from replicas.engine.decoders.round import SegmentRequest
from replicas.messages import SamplingParams
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from training.tasks.family import Task
from training.tasks.registry import FAMILIES, held_out_tasks

MAX_TOKENS = 320
AT_ONCE = 52
"""Sequences in a forward; no figure depends on it."""
GREEDY = SamplingParams()
Rule = Callable[[Sequence[float]], int]
"""Takes the masked positions' probabilities, highest first, and tells how many to fix, at least the first."""


def fixed(threshold: float) -> Rule:
    """Fixes the positions that reach the threshold."""
    return lambda probs: sum(prob >= threshold for prob in probs)


def factor(limit: float) -> Rule:
    """Fixes the most, n, for which (n + 1)(1 - p_n) < limit (Fast-dLLM's factor, arXiv 2505.22618)."""
    return lambda probs: max((n for n, p in enumerate(probs, 1) if (n + 1) * (1 - p) < limit), default=0)


def joint(threshold: float) -> Rule:
    """Fixes the most whose probabilities' product reaches the threshold."""
    return lambda probs: sum(product >= threshold for product in accumulate(probs, mul))


@dataclass(frozen=True, slots=True)
class Way:
    """A way to decode by diffusion."""

    name: str
    rule: Rule
    block_length: int
    """Positions seen at once at first, the seed among them."""
    commit_at: int
    """The number of final tokens, the seed among them, at which they are committed, block complete or not."""
    reach: int
    """The most positions seen, as the final ones grow; past block_length they are the next block's."""
    carries: bool = True
    """If true, what is fixed past the final ones goes over to the next block; else it is forgotten."""
    joins_commit: bool = False
    """If true, the next block's first denoising, its seed still masked, runs in the forward that commits."""


def ways(block: int) -> Iterator[Way]:
    rules = {f"threshold {t}": fixed(t) for t in (0.7, 0.8, 0.9, 0.95, 0.98, 0.99)}
    rules |= {f"factor {f}": factor(f) for f in (0.1, 0.25, 0.5, 1.0)}
    rules |= {f"joint {t}": joint(t) for t in (0.7, 0.9)}
    for name, rule in rules.items():
        yield Way(name, rule, block, block, block)
    for name in ("threshold 0.9", "factor 0.25"):
        rule, half = rules[name], f"{name}, half a block committed"
        yield Way(f"{half}, the rest forgotten", rule, block, block // 2, block, carries=False)
        yield Way(half, rule, block, block // 2, block)
        yield Way(f"{name}, a quarter committed", rule, block, block // 4, block)
        yield Way(f"{name}, next block begun early", rule, block, block, 2 * block)
        yield Way(f"{name}, next block begun in the commit", rule, block, block, block, joins_commit=True)


class Decoding:
    """One sequence, from its prefill on."""

    def __init__(self, prompt: Sequence[int], way: Way, mask: int, eos: frozenset[int], max_context: int):
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.num_cached = 0
        self.num_forwards = self.num_rows = 0
        self.is_over = False
        self._way, self._mask, self._eos, self._max_context = way, mask, eos, max_context
        self._block: list[int | None] = []
        self._num_final = 1

    def next_segments(self) -> list[SegmentRequest]:
        """The segments of the next forward, one after the other from num_cached on."""
        if not self.num_cached:
            return [SegmentRequest(tuple(self.tokens), len(self.tokens), False, (len(self.tokens) - 1,))]
        if not self._is_committing:
            return [self._denoising(self._block)]
        final = tuple(token for token in self._block[: self._num_final] if token is not None)
        requests = [SegmentRequest(final, len(final), False, (len(final) - 1,))]
        if self._way.joins_commit:
            self._block = [None] * min(
                self._way.block_length, self._max_context - self.num_cached - len(final)
            )
            requests.append(self._denoising(self._block))
        return requests

    def apply_outputs(self, requests: Sequence[SegmentRequest], outputs: Sequence[SegmentOutput]) -> None:
        if not self.num_cached:
            self.num_cached = len(self.tokens)
            self._begin(outputs[0].token_ids[0], [])
            return
        self.num_forwards += 1
        self.num_rows += sum(len(request.token_ids) for request in requests)
        if requests[0].num_causal:
            self.num_cached += self._num_final
            seed = outputs[0].token_ids[0]
            if len(requests) == 2:
                self._fix(requests[1], outputs[1])
                self._begin(seed, self._block[1:])
            else:  # the position after the final ones was still masked; what is past it may go over
                self._begin(seed, self._block[self._num_final + 1 :] if self._way.carries else [])
            return
        self._fix(requests[0], outputs[0])
        self._take_final()

    def _denoising(self, block: Sequence[int | None]) -> SegmentRequest:
        tokens = tuple(self._mask if token is None else token for token in block)
        masked = tuple(index for index, token in enumerate(block) if token is None)
        return SegmentRequest(tokens, 0, False, masked)

    def _fix(self, request: SegmentRequest, output: SegmentOutput) -> None:
        ranked = sorted(zip(output.probs, request.wanted, output.token_ids, strict=True), reverse=True)
        count = max(1, self._way.rule([prob for prob, _, _ in ranked]))
        for _, index, token in ranked[:count]:
            self._block[index] = token

    @property
    def _is_committing(self) -> bool:
        return self._num_final >= min(self._way.commit_at, len(self._block))

    def _begin(self, seed: int, carried: Sequence[int | None]) -> None:
        self._block = [seed, *carried]
        self._num_final = 1
        self._take(seed)
        self._take_final()

    def _take_final(self) -> None:
        way = self._way
        while self._num_final < len(self._block) and (token := self._block[self._num_final]) is not None:
            self._num_final += 1
            self._take(token)
        length = max(way.block_length, min(self._num_final + way.block_length, way.reach))
        length = min(length, self._max_context - self.num_cached)
        self._block += [None] * (length - len(self._block))

    def _take(self, token: int) -> None:
        if not self.is_over:
            self.tokens.append(token)
            self.is_over = token in self._eos or len(self.tokens) - self.num_prompt >= MAX_TOKENS


def decode(runner: TorchRunner, prompts: Sequence[Sequence[int]], way: Way) -> list[Decoding]:
    """Decodes the prompts greedily, AT_ONCE at a time."""
    spec = runner.spec
    assert spec.mask_token_id is not None
    per_sequence = spec.num_pages // AT_ONCE
    found = []
    for first in range(0, len(prompts), AT_ONCE):
        crowd = [
            Decoding(prompt, way, spec.mask_token_id, spec.eos_token_ids, spec.max_context)
            for prompt in prompts[first : first + AT_ONCE]
        ]
        found += crowd
        while running := [
            (number, one, one.next_segments()) for number, one in enumerate(crowd) if not one.is_over
        ]:
            segments = []
            for number, one, requests in running:
                start = one.num_cached
                for request in requests:
                    num_pages = ceil((start + len(request.token_ids)) / spec.page_size)
                    assert num_pages <= per_sequence
                    pages = tuple(range(number * per_sequence, number * per_sequence + num_pages))
                    segments.append(
                        Segment(
                            seq_id=number,
                            start=start,
                            token_ids=request.token_ids,
                            pages=pages,
                            num_causal=request.num_causal,
                            adapter=request.adapter,
                            wanted=request.wanted,
                            sampling=GREEDY,
                        )
                    )
                    start += len(request.token_ids)
            outputs = iter(runner.run(ScheduledBatch(tuple(segments))))
            for _, one, requests in running:
                one.apply_outputs(requests, [next(outputs) for _ in requests])
    return found


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one way."""

    way: str
    block_length: int
    num_tasks: int
    exact: float
    """The share of answers that are exact."""
    tokens_per_forward: float
    rows_per_forward: float
    """Query tokens a forward."""


def score(way: Way, tasks: Sequence[Task], decoded: Sequence[Decoding], codec: TextCodec) -> Row:
    exact = 0
    for task, one in zip(tasks, decoded, strict=True):
        stream = codec.stream()
        text = stream.push(tuple(one.tokens[one.num_prompt :])) + stream.finish()
        ended = len(one.tokens) - one.num_prompt < MAX_TOKENS
        exact += ended and FAMILIES[task.family].check(task.params, text)
    num_tokens = sum(len(one.tokens) - one.num_prompt - 1 for one in decoded)
    num_forwards = sum(one.num_forwards for one in decoded)
    num_rows = sum(one.num_rows for one in decoded)
    return Row(
        way.name,
        way.block_length,
        len(tasks),
        exact / len(tasks),
        num_tokens / num_forwards,
        num_rows / num_forwards,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--per-family", type=int, default=20, help="held-out tasks of each family")
    parser.add_argument("--only", default="", help="only the ways with this in their name")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    runner = TorchRunner.load(str(CHECKPOINT), num_threads=options.threads)
    codec = TextCodec.load(str(CHECKPOINT))
    tasks = [task for family in FAMILIES for task in held_out_tasks(family, options.per_family)]
    prompts = [codec.encode(({"role": "user", "content": task.prompt},)) for task in tasks]
    found = []
    print(f"{len(tasks)} held-out prompts")
    print("| block | way | exact % | tokens/forward | rows/forward |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for block in options.blocks:
        for way in ways(block):
            if options.only not in way.name:
                continue
            row = score(way, tasks, decode(runner, prompts, way), codec)
            found.append(asdict(row))
            print(
                f"| {block} | {row.way} | {100 * row.exact:.1f} | {row.tokens_per_forward:.2f} "
                f"| {row.rows_per_forward:.1f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
