"""Every step of an engine finds a graph, few graphs are enough, and the warm-up meets them all. Pure."""

import random
from dataclasses import replace

import pytest
import torch

from replicas.engine.batch import Segment
from replicas.kernels.attention import TILE_SHAPES
from replicas.model.config import ModelConfig
from replicas.model.cuda.inputs import HostStep, StepSize
from replicas.model.cuda.sizes import (
    MAX_GRAPH_LOGITS_BYTES,
    MAX_GRAPH_ROWS,
    MAX_GRAPH_RULED_BYTES,
    MAX_GRAPHS,
    GraphSizes,
    batches,
    eager,
)
from tests.replicas.model.conftest import segment
from tests.tiny_checkpoint import tiny_config

CONFIG = ModelConfig.parse(tiny_config())
PAGE = 64
PLACES = (12, 8, 4)


def config_of(queries_per_kv: int) -> ModelConfig:
    return replace(CONFIG, num_heads=2 * queries_per_kv, num_kv_heads=2)


def some_step(rng: random.Random) -> list[Segment]:
    """Any mixture of segments, of up to the most rows."""
    most, segments = rng.choice((1, 4, 60, 500, MAX_GRAPH_ROWS)), []
    kinds = rng.sample(("step", "verify", "draft", "prompt"), rng.randint(1, 4))
    while most > 0 and len(segments) < 128:
        kind = rng.choice(kinds)
        length = 1 if kind == "step" else rng.randint(1, 64 if kind != "prompt" else 700)
        if length > most:
            break
        most -= length
        wanted = (length - 1,) if kind == "prompt" else range(length)
        made = segment([1] * length, tuple(range(12)), wanted=tuple(wanted), seq_id=len(segments))
        segments.append(replace(made, num_causal=0, adapter=True) if kind == "draft" else made)
    return segments or [segment([1], (0,), wanted=(0,))]


@pytest.mark.parametrize("queries_per_kv", [1, 3, 4, 8, 32])
def test_every_step_that_fits_is_held_by_one_of_few_sizes(queries_per_kv: int) -> None:
    config = config_of(queries_per_kv)
    sizes = GraphSizes(config, PLACES)
    assert len(sizes.sizes) <= MAX_GRAPHS
    rng = random.Random(queries_per_kv)
    for _ in range(300):
        size = HostStep.pack(some_step(rng), config, PAGE, PLACES).size
        held = sizes.padded(size)
        assert held is not None, size
        assert held.num_rows <= max(8, 2 * size.num_rows)
        assert all(count <= most for count, most in zip(size.num_items, held.num_items, strict=True))


def test_a_step_of_single_tokens_runs_neither_adapter_nor_large_tiles() -> None:
    for count in (1, 3, 64, 128):
        segments = [segment([1], (0,), wanted=(0,), seq_id=number) for number in range(count)]
        held = GraphSizes(CONFIG, PLACES).padded(HostStep.pack(segments, CONFIG, PAGE, PLACES).size)
        assert held is not None
        assert (held.has_adapter, held.num_items[1:]) == (False, (0, 0))
        assert held.num_rows < 2 * count


def test_a_short_verify_of_a_lone_request_has_a_graph() -> None:
    sizes = GraphSizes(CONFIG, PLACES)
    for length in (2, 3, 4):
        short = segment([1] * length, (0,), wanted=tuple(range(length)))
        assert sizes.padded(HostStep.pack([short], CONFIG, PAGE, PLACES).size) in sizes.up_to(1, 512)


def test_what_is_too_large_has_no_size() -> None:
    sizes = GraphSizes(CONFIG, PLACES)
    for counts in ((2049, 1, 0, 1), (2048, 2049, 0, 1), (512, 512, 257, 1), (256, 256, 0, 129)):
        size = StepSize(*counts, (0,) * len(TILE_SHAPES), False)
        assert sizes.padded(size) is None
        assert eager(size).num_rows % 256 == 0


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "most"),
    [(131_072, torch.bfloat16, 2048), (262_144, torch.bfloat16, 1024), (131_072, torch.float32, 1024)],
)
def test_logits_of_graphs_are_bounded_by_their_bytes(vocab_size: int, dtype: torch.dtype, most: int) -> None:
    config = replace(CONFIG, vocab_size=vocab_size)
    sizes = GraphSizes(config, PLACES, dtype)
    assert sizes.max_wanted == max(size.num_wanted for size in sizes.sizes) == most
    assert most * vocab_size * dtype.itemsize <= MAX_GRAPH_LOGITS_BYTES
    ruled = max(size.num_ruled for size in sizes.sizes)
    assert ruled * vocab_size * 4 <= MAX_GRAPH_RULED_BYTES
    made = batches(sizes.sizes, PAGE, num_pages=40, max_context=2560)
    met = {sizes.padded(HostStep.pack(batch.segments, config, PAGE, PLACES).size) for batch in made}
    assert met == set(sizes.sizes)


@pytest.mark.parametrize("max_running", [1, 20, 64, 256])
@pytest.mark.parametrize("max_step_tokens", [96, 512, 2048, 8192])
def test_the_warm_up_meets_every_size_that_its_bounds_allow(max_running: int, max_step_tokens: int) -> None:
    sizes = GraphSizes(CONFIG, PLACES)
    expected = sizes.up_to(max_running, max_step_tokens)
    made = list(batches(expected, PAGE, num_pages=40, max_context=2560))
    met = {sizes.padded(HostStep.pack(batch.segments, CONFIG, PAGE, PLACES).size) for batch in made}
    assert met == set(expected) | {sizes.sizes[0]}
    rng = random.Random(max_running)
    for _ in range(100):
        step = some_step(rng)
        size = HostStep.pack(step, CONFIG, PAGE, PLACES).size
        if size.num_rows <= max_step_tokens and len(step) <= max_running:
            assert sizes.padded(size) in {None, *expected}


@pytest.mark.parametrize(
    ("page_size", "num_pages", "max_context"), [(16, 1, 16), (64, 4, 33), (8, 1000, 4096)]
)
def test_the_warm_up_stays_in_the_pool_and_the_context(
    page_size: int, num_pages: int, max_context: int
) -> None:
    for batch in batches(GraphSizes(CONFIG, PLACES).sizes, page_size, num_pages, max_context):
        for part in batch.segments:
            assert max(part.pages) < num_pages
            assert len(part.token_ids) <= min(max_context, page_size * len(part.pages))
