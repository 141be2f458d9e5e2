"""What an `ar` step of the 8B would cost on an H200, by a model.

`python -m benchmarks.gpu.offline.step_model`

Nothing of it is measured but the bandwidth of a copy. A step is the sum of its launches: each takes the
longer of its bytes over the bandwidth and of its latency, and a gap follows it. The launches are those that
benchmarks.gpu.offline.launches counts, and by assumption one more behind each of cuBLAS's products to the
residual, which adds the parts of its sums. Attention's programs are those of the list of work that a step has
(replicas.kernels.tiling), each begun where one has ended.

A kernel of ours behind one of ours begins before that has ended (programmatic dependent launch), which by
assumption hides most of the gap and, as the first weights are in the L2 cache by then, of a product's ramp.
Behind cuBLAS's, and behind torch's, it begins in its turn.

`--in-turn` has all kernels begin so, `--before` the launches of before the products of few rows, with
attention split alike for all, and `--weights-in-8-bits` weights in 8 bits. The last line is of contexts that
differ: 64 requests of 1,000 tokens and one of 90,000. Under "of_ms" is what the parts are for: "floor" is the
weights at a copy's rate, "rate" what products lose to it, "L2" what the rows read again take beyond that,
"ramps and gaps" those of the products, "sums" the kernels behind cuBLAS's.
"""

import argparse
import heapq
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence

from replicas.kernels.tiling import work_of

_BYTES_PER_S = 4.3e12
"""Of a copy on an H200, read and written; measured."""
_L2_BYTES_PER_S = 5.5e12
"""From the L2 cache to all SMs; assumed."""
_OF_COPY = 0.90
"""What a product reaches of a copy; assumed, for cuBLAS's and for ours alike."""
_GAP_US, _TINY_US, _RAMP_US = 1.2, 1.8, 2.0
"""Between two nodes of a graph; a tiny kernel; the ramp and tail of a product. Assumed."""
_EARLY_GAP_US, _EARLY_RAMP_US = 0.3, 0.8
"""What is left of a gap and of a ramp where a kernel begins before the one before it has ended. Assumed."""
_NUM_SMS, _RESIDENT = 132, 3
_BLOCK_US = {"before": 1.5, "now": 0.9}
"""A block of 64 keys in an attention program's turn: with one buffer of keys and values, and with two or
three. Assumed."""
_LAYERS, _HIDDEN, _HEADS, _KV_HEADS, _DIM, _WIDTH, _VOCAB = 34, 4096, 32, 8, 128, 14336, 131072
_BEGIN_US = 1.5
"""Of an attention program that begins where another has ended, until its first keys are there. Assumed."""
_COUNT_US, _MERGE_US = 1.0, 0.8
"""To count the parts that have ended, and to merge four of them. Assumed."""
_OURS_UP_TO = 16
"""Rows up to which the products to the residual are ours (replicas.kernels.project)."""
_CONTEXT = 800
_UNEVEN = (90_000, *[1000] * 64)
_FILTER_PASSES, _PASS_US = 20, 5.0
"""Over a row's logits by one program, where a request has top_p; assumed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", action="store_true")
    parser.add_argument("--in-turn", action="store_true")
    parser.add_argument("--weights-in-8-bits", action="store_true")
    options = parser.parse_args()
    when, itemsize = "before" if options.before else "now", 1 if options.weights_in_8_bits else 2
    overlaps = not (options.before or options.in_turn)
    for contexts in (*([_CONTEXT] * batch for batch in (1, 8, 16, 32, 64)), _UNEVEN):
        parts: dict[str, float] = defaultdict(float)
        for name, us in _parts(contexts, when, itemsize, overlaps):
            parts[name] += us
        step_ms = sum(parts.values()) / 1e3
        floor_ms = _weight_bytes(itemsize) / _BYTES_PER_S * 1e3
        print(
            json.dumps(
                {
                    "batch": len(contexts),
                    "longest": max(contexts),
                    "ms": round(step_ms, 2),
                    "over_weights": round(step_ms / floor_ms, 2),
                    "of_ms": {name: round(us / 1e3, 2) for name, us in parts.items()},
                    "top_p_ms": round(_FILTER_PASSES * _PASS_US / 1e3, 2),
                }
            )
        )


def _weight_bytes(itemsize: int) -> int:
    qkv = _HIDDEN * (_HEADS + 2 * _KV_HEADS) * _DIM
    return itemsize * (_LAYERS * (qkv + _HEADS * _DIM * _HIDDEN + 3 * _HIDDEN * _WIDTH) + _VOCAB * _HIDDEN)


def _parts(contexts: Sequence[int], when: str, itemsize: int, overlaps: bool) -> Iterator[tuple[str, float]]:
    """The parts of a step in microseconds, by name.

    overlaps: kernels of ours begin before those of ours before them have ended
    """
    few, batch = when == "now", len(contexts)
    ours = few and (batch <= _OURS_UP_TO or itemsize == 1)
    qkv = (_HEADS + 2 * _KV_HEADS) * _DIM
    # Between two layers, and between attention and the output product, but for the last selection of rows.
    early = overlaps and ours
    for size, num_columns, columns, num_early in (
        (_HIDDEN, qkv, 32 if few else 64, early * (_LAYERS - 1)),
        (_HIDDEN, 2 * _WIDTH, 128, early * _LAYERS),
        (_HEADS * _DIM, _HIDDEN, 32 if ours else 64, early * (_LAYERS - 1)),
        (_WIDTH, _HIDDEN, 32 if ours else 64, early * _LAYERS),
    ):
        for name, us in _product(batch, size, num_columns, columns, itemsize):
            yield name, _LAYERS * us
        yield "ramps and gaps", _ramps_and_gaps(_LAYERS - num_early, num_early)
    yield from _product(batch, _HIDDEN, _VOCAB, 128, itemsize)
    yield "ramps and gaps", _ramps_and_gaps(1, 0)
    if not ours:
        yield "sums", _LAYERS * 2 * (_TINY_US + _GAP_US)
    gap_us = _EARLY_GAP_US if overlaps else _GAP_US
    yield "attention", _LAYERS * (gap_us + _attention(contexts, when))
    if not few:
        yield "norms, rotation, gate", _LAYERS * 4 * (_TINY_US + _GAP_US)
    # Copy, embedding, two selections of rows, the last norm, scan, merge, two kernels of the sampler, copy.
    yield "the rest", 10 * _TINY_US + 8 * _GAP_US + 2 * gap_us


def _product(
    batch: int, size: int, num_columns: int, columns: int, itemsize: int
) -> Iterator[tuple[str, float]]:
    """A product that reads its weights once, and its rows once for each block of so many columns."""
    weights = itemsize * size * num_columns
    through_l2 = weights + 2 * size * batch * -(-num_columns // columns)
    floor_us, reached_us = weights / _BYTES_PER_S * 1e6, weights / (_BYTES_PER_S * _OF_COPY) * 1e6
    yield "floor", floor_us
    yield "rate", reached_us - floor_us
    yield "L2", max(0.0, through_l2 / _L2_BYTES_PER_S * 1e6 - reached_us)


def _ramps_and_gaps(num_in_turn: int, num_early: int) -> float:
    return num_in_turn * (_RAMP_US + _GAP_US) + num_early * (_EARLY_RAMP_US + _EARLY_GAP_US)


def _attention(contexts: Sequence[int], when: str) -> float:
    read = sum(contexts) * 2 * _KV_HEADS * _DIM * 2 / (_BYTES_PER_S * 0.85) * 1e6
    us = 3.2 + (_split_alike if when == "before" else _by_work)(contexts)
    return max(us, read + 2.0)


def _split_alike(contexts: Sequence[int]) -> float:
    """The time of programs that each have as great a part of their context, and of merging them after."""
    batch = len(contexts)
    num_splits = min(32, 1 << max(_RESIDENT * _NUM_SMS // (batch * _KV_HEADS), 1).bit_length() - 1)
    num_blocks = [-(-context // 64) for context in contexts]
    in_turn = [max(-(-count // num_splits), 2 if num_splits > 1 else 1) for count in num_blocks]
    items = [own for count, own in zip(num_blocks, in_turn, strict=True) for _ in range(-(-count // own))]
    return _in_places(items, _BLOCK_US["before"]) + (_TINY_US + 1.0 + _GAP_US if num_splits > 1 else 0.0)


def _by_work(contexts: Sequence[int]) -> float:
    places = _RESIDENT * _NUM_SMS // _KV_HEADS
    starts, ones = [context - 1 for context in contexts], [1] * len(contexts)
    items = work_of(starts, ones, ones, _HEADS // _KV_HEADS, (places, places, places))[0]
    blocks = []
    for segment, _, split, num_splits, keys, _ in items.tolist():
        is_last = split == num_splits - 1
        blocks.append(-(-(contexts[segment] - split * keys if is_last else keys) // 64))
    most = int(items[:, 3].max())
    return _in_places(blocks, _BLOCK_US["now"]) + (_COUNT_US + -(-most // 4) * _MERGE_US if most > 1 else 0.0)


def _in_places(items: Sequence[int], block_us: float) -> float:
    """The time until the last of the programs has ended: for each K/V head one an item, of so many blocks."""
    places = [-_BEGIN_US] * (_RESIDENT * _NUM_SMS)
    for blocks in items:
        for _ in range(_KV_HEADS):
            heapq.heapreplace(places, places[0] + _BEGIN_US + blocks * block_us)
    return max(places)


if __name__ == "__main__":
    main()
