"""What an `ar` step of the 8B would cost on an H200, by a model.

`python -m benchmarks.gpu.offline.step_model`

Nothing of it is measured but the bandwidth of a copy. A step is the sum of its launches: each takes the
longer of its bytes over the bandwidth and of its latency, and a gap follows it. The launches are those that
benchmarks.gpu.offline.launches counts, and two more a layer by assumption, which add the parts of cuBLAS's
thin sums. `--before` has the launches of before the products of few rows.
"""

import argparse
import json
from collections.abc import Iterator

_BYTES_PER_S = 4.3e12
"""Of a copy on an H200, read and written; measured."""
_L2_BYTES_PER_S = 5.5e12
"""From the L2 cache to all SMs; assumed."""
_OF_COPY = 0.90
"""What a product reaches of a copy; assumed, for cuBLAS's and for ours alike."""
_GAP_US, _TINY_US, _RAMP_US = 1.2, 1.8, 2.0
"""Between two nodes of a graph; a tiny kernel; the ramp and tail of a product. Assumed."""
_NUM_SMS, _RESIDENT = 132, 3
_BLOCK_US = {"before": 1.5, "now": 0.9}
"""A block of 64 keys in an attention program's turn: with one buffer of keys and values, and with two or
three. Assumed."""
_LAYERS, _HIDDEN, _HEADS, _KV_HEADS, _DIM, _WIDTH, _VOCAB = 34, 4096, 32, 8, 128, 14336, 131072
_CONTEXT = 800
_FILTER_PASSES, _PASS_US = 20, 5.0
"""Over a row's logits by one program, where a request has top_p; assumed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", action="store_true")
    before = parser.parse_args().before
    for batch in (1, 8, 16, 32, 64):
        parts = dict(_parts(batch, "before" if before else "now"))
        step_ms = sum(parts.values()) / 1e3
        print(
            json.dumps(
                {
                    "batch": batch,
                    "ms": round(step_ms, 2),
                    "over_weights": round(step_ms / (_weight_bytes() / _BYTES_PER_S * 1e3), 2),
                    "of_ms": {name: round(us / 1e3, 2) for name, us in parts.items()},
                    "top_p_ms": round(_FILTER_PASSES * _PASS_US / 1e3, 2),
                }
            )
        )


def _weight_bytes() -> int:
    qkv = _HIDDEN * (_HEADS + 2 * _KV_HEADS) * _DIM
    return 2 * (_LAYERS * (qkv + _HEADS * _DIM * _HIDDEN + 3 * _HIDDEN * _WIDTH) + _VOCAB * _HIDDEN)


def _parts(batch: int, when: str) -> Iterator[tuple[str, float]]:
    """The parts of a step in microseconds, by name."""
    few = when == "now"
    qkv = (_HEADS + 2 * _KV_HEADS) * _DIM
    products = _product(batch, _HIDDEN, qkv, 32 if few else 64) + _product(batch, _HIDDEN, 2 * _WIDTH, 128)
    products += _product(batch, _HEADS * _DIM, _HIDDEN, 64) + _product(batch, _WIDTH, _HIDDEN, 64)
    yield "products", _LAYERS * (products + 2 * (_TINY_US + _GAP_US))
    yield "attention", _LAYERS * _attention(batch, when)
    yield "norms, rotation, gate", 0.0 if few else _LAYERS * 4 * (_TINY_US + _GAP_US)
    yield "head", _product(batch, _HIDDEN, _VOCAB, 128)
    # Copy, embedding, two selections of rows, the last norm, scan, merge, two kernels of the sampler, copy.
    yield "the rest", 10 * (_TINY_US + _GAP_US)


def _product(batch: int, size: int, num_columns: int, columns: int) -> float:
    """A product that reads its weights once, and its rows once for each block of so many columns."""
    weights = 2 * size * num_columns
    through_l2 = weights + 2 * size * max(batch, 16) * -(-num_columns // columns)
    seconds = max(weights / (_BYTES_PER_S * _OF_COPY), through_l2 / _L2_BYTES_PER_S)
    return seconds * 1e6 + _RAMP_US + _GAP_US


def _attention(batch: int, when: str) -> float:
    num_splits = min(32, 1 << max(_RESIDENT * _NUM_SMS // (batch * _KV_HEADS), 1).bit_length() - 1)
    num_blocks = -(-_CONTEXT // 64)
    in_turn = max(-(-num_blocks // num_splits), 2 if num_splits > 1 else 1)
    programs = batch * _KV_HEADS * -(-num_blocks // in_turn)
    waves = -(-programs // (_RESIDENT * _NUM_SMS))
    read = batch * _CONTEXT * 2 * _KV_HEADS * _DIM * 2 / (_BYTES_PER_S * 0.85) * 1e6
    us = max(3.2 + waves * in_turn * _BLOCK_US[when], read + 2.0) + _GAP_US
    return us + (_TINY_US + 1.0 + _GAP_US if num_splits > 1 else 0.0)


if __name__ == "__main__":
    main()
