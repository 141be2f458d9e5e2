"""Sampling against brute force in numpy, and against the distributions it must follow."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replicas.engine.history import Prefix
from replicas.messages import JsonFormat, SamplingParams
from replicas.model.logit_rules import Row
from replicas.model.sampler import sample, uniforms
from tests.thorough import examples

VOCAB = 23


def params(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> SamplingParams:
    return SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)


def run(
    logits: torch.Tensor, rows: list[tuple[SamplingParams, int]], mask_token_id: int | None = None
) -> tuple[list[int], list[float]]:
    made = sample(logits.clone(), [Row(params, position) for params, position in rows], mask_token_id)
    return made[0], made[1]


def brute_force(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """The distribution, by the definition: temperature, then top_k, then top_p of what is left."""
    scaled = logits.astype(np.float64) / p.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    if p.top_k:
        order = order[: p.top_k]
    mass = sum(probs[token] for token in order)
    kept, so_far = [], 0.0
    for token in order:
        if so_far >= p.top_p * mass and kept:
            break
        kept.append(token)
        so_far += probs[token]
    filtered = np.zeros_like(probs)
    filtered[kept] = probs[kept]
    return filtered / filtered.sum()


def test_greedy_is_argmax_with_its_probability() -> None:
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    tokens, probs = run(logits, [(params(temperature=0.0), i) for i in range(9)])
    assert tokens == logits.argmax(-1).tolist()
    assert probs == pytest.approx(logits.softmax(-1).max(-1).values.tolist(), rel=1e-5)


def test_mask_token_has_no_part() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    logits[:, 7] = 30.0
    rows = [(params(temperature=t), 5) for t in (0.0, 1.0, 0.0, 3.0)]
    tokens, probs = run(logits, rows, mask_token_id=7)
    assert 7 not in tokens
    allowed = logits.clone()
    allowed[:, 7] = -math.inf
    expected = allowed.softmax(-1)[range(4), tokens].tolist()
    assert probs == pytest.approx(expected, rel=1e-5)


def test_probability_is_before_temperature_and_filters() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2))
    [token], [prob] = run(logits, [(params(temperature=0.3, top_k=2, top_p=0.5), 3)])
    assert prob == pytest.approx(float(logits.softmax(-1)[0, token]), rel=1e-5)


@pytest.mark.parametrize(
    "p",
    [
        params(),
        params(temperature=0.5),
        params(temperature=2.5, top_k=5),
        params(top_p=0.6),
        params(temperature=1.7, top_k=9, top_p=0.8),
        params(top_k=1),
        params(top_p=1e-9),
        params(top_k=1000),
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(p: SamplingParams) -> None:
    """Chi-square over many positions of one seed; nothing outside the filters is ever drawn."""
    draws = 8_000
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    rows = [(p, position) for position in range(draws)]
    tokens, _ = run(row.expand(draws, VOCAB), rows)
    expected = brute_force(row.numpy(), p) * draws
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum() - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 1e-9


def test_equal_logits_rank_by_token_id() -> None:
    logits = torch.zeros(200, VOCAB)
    tokens, _ = run(logits, [(params(top_k=4), position) for position in range(200)])
    assert set(tokens) == {0, 1, 2, 3}


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(40, VOCAB, generator=generator) * 2
    kinds = [params(0.0), params(1.0), params(0.7, top_k=3), params(1.3, top_p=0.7), params(1.0, 6, 0.9)]
    rows = [
        (SamplingParams(1, k.temperature, k.top_p, k.top_k, seed=i), i * 3) for i, k in enumerate(kinds * 8)
    ]
    together, probs = run(logits, rows)
    for index, row in enumerate(rows):
        [token], [prob] = run(logits[index : index + 1], [row])
        assert token == together[index]
        assert prob == pytest.approx(probs[index], rel=1e-6)


def test_uniforms_depend_on_seed_and_position_alone() -> None:
    seeds, positions = [0, 1, 2**63, -1, 2**70 + 1], [0, 1, 5, 100_000, 3]
    together = uniforms(seeds, positions)
    alone = [uniforms([seed], [position])[0] for seed, position in zip(seeds, positions, strict=True)]
    assert together.tolist() == alone
    assert ((together >= 0) & (together < 1)).all()


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_uniforms_are_uniform_and_uncorrelated(along: str) -> None:
    count = 20_000
    ramp, fixed = list(range(count)), [17] * count
    numbers = uniforms(fixed, ramp) if along == "positions" else uniforms(ramp, fixed)
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    statistic = ((counts - count / 100) ** 2 / (count / 100)).sum()
    assert statistic < 99 + 5 * math.sqrt(2 * 99)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def test_extreme_logits_stay_finite() -> None:
    logits = torch.full((2, VOCAB), -1e4)
    logits[:, 3] = 1e4
    tokens, probs = run(logits, [(params(1e-3), 0), (params(1.0, top_p=0.5), 1)])
    assert tokens == [3, 3]
    assert probs == [1.0, 1.0]


def test_min_p_against_its_definition() -> None:
    logits = torch.randn(400, VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    sampling = SamplingParams(temperature=1.3, min_p=0.2, seed=4)
    tokens, _ = run(logits, [(sampling, position) for position in range(400)])
    probs = (logits / 1.3).softmax(-1)
    chosen = probs[range(400), tokens]
    assert bool((chosen >= 0.2 * probs.amax(-1)).all())
    assert (torch.tensor(tokens) != logits.argmax(-1)).sum() > 20


def test_penalties_and_bias_against_their_definitions() -> None:
    """On the greedy choice, over random histories; the reported probability stays the raw one."""
    rng = np.random.default_rng(7)
    for _ in range(50):
        logits = torch.tensor(rng.normal(size=(1, VOCAB)) * 2, dtype=torch.float32)
        prompt_len = int(rng.integers(0, 6))
        seen = tuple(
            int(token) for token in rng.integers(0, VOCAB, size=prompt_len + int(rng.integers(0, 9)))
        )
        sampling = SamplingParams(
            presence_penalty=float(rng.uniform(-2, 2)),
            frequency_penalty=float(rng.uniform(-2, 2)),
            repetition_penalty=float(rng.uniform(0.5, 2)),
            logit_bias=((3, 1.5), (4, -2.0)),
        )
        expected = logits[0].tolist()
        for token in set(seen):
            scale = sampling.repetition_penalty
            expected[token] = expected[token] / scale if expected[token] > 0 else expected[token] * scale
        for token in set(seen[prompt_len:]):
            count = seen[prompt_len:].count(token)
            expected[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
        expected[3] += 1.5
        expected[4] -= 2.0
        row = Row(sampling, len(seen), prompt_len, Prefix.of(seen, prompt_len))
        [token], [prob], _ = sample(logits.clone(), [row], None)
        assert token == int(np.argmax(expected))
        assert prob == pytest.approx(float(logits.softmax(-1)[0, token]), rel=1e-4)


def test_min_tokens_holds_back_the_end_of_text_only_so_long() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 2] = 9.0
    rows = [Row(SamplingParams(min_tokens=3), position, prompt_len=10) for position in (12, 13)]
    tokens, _, _ = sample(logits, rows, None, frozenset({2}))
    assert tokens[0] != 2
    assert tokens[1] == 2


def test_log_probabilities_of_the_most_probable() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(6))
    rows = [Row(SamplingParams(logprobs=n), 0) for n in (0, 4)] + [Row(SamplingParams(), 0)]
    _, _, tops = sample(logits.clone(), rows, None)
    assert tops.keys() == {0, 1}
    assert tops[0] == ()
    values, ids = logits[1].log_softmax(-1).topk(4)
    assert [token for token, _ in tops[1]] == ids.tolist()
    assert [value for _, value in tops[1]] == pytest.approx(values.tolist(), rel=1e-5)


BYSTANDERS = (
    SamplingParams(),
    SamplingParams(temperature=0.9, top_p=0.8, seed=5),
    SamplingParams(logprobs=3),
)
SICK = {
    "NaN": [math.nan],
    "NaN among others": [0.5] * 11 + [math.nan] + [1.5] * 11,
    "+inf": [0.5, math.inf] + [1.5] * 21,
    "all -inf": [-math.inf],
}


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1.0])
@pytest.mark.parametrize("sick", SICK)
@pytest.mark.parametrize("given", [{}, {"top_k": 3}, {"logprobs": 2}, {"repetition_penalty": 1.2}], ids=str)
def test_a_row_that_is_not_finite_has_no_token_and_changes_no_other(
    sick: str, temperature: float, given: dict[str, float]
) -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(8)) * 2
    logits[1] = torch.tensor(SICK[sick] * (VOCAB // len(SICK[sick])))
    rows = [Row(sampling, 7) for sampling in BYSTANDERS]
    rows.insert(1, Row(SamplingParams(temperature=temperature, **given), 7, seen=Prefix.of((1, 2))))
    tokens, probs, tops = sample(logits.clone(), rows, None)
    assert not math.isfinite(probs[1])
    assert 0 <= tokens[1] < VOCAB
    for index in (0, 2, 3):
        [token], [prob], top = sample(logits[index : index + 1].clone(), [rows[index]], None)
        assert (tokens[index], probs[index], tops.get(index)) == (token, prob, top.get(0))


def test_a_row_of_whose_tokens_the_rules_leave_none_has_no_token() -> None:
    """A grammar that allows an end of text alone, which min_tokens forbids; and a penalty that overflows."""
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(9)) * 20
    for temperature in (0.0, 1.0):
        ends = SamplingParams(temperature=temperature, min_tokens=4)
        overflows = SamplingParams(temperature=temperature, repetition_penalty=3e-38)
        plain = SamplingParams(temperature=temperature)
        rows = [
            Row(plain, 9),
            Row(ends, 9, prompt_len=8, allowed=b"\x04"),
            Row(overflows, 9, seen=Prefix.of(range(VOCAB))),
            Row(plain, 9),
        ]
        tokens, probs, _ = sample(logits.clone(), rows, None, frozenset({2}))
        assert [math.isfinite(prob) for prob in probs] == [True, False, False, True]
        for index in (0, 3):
            assert ([tokens[index]], [probs[index]]) == run(logits[index : index + 1], [(plain, 9)])


def numbers(least: float, most: float, *far: float) -> st.SearchStrategy[float]:
    return st.floats(least, most) | st.sampled_from(
        [*far, math.nan, math.inf, -math.inf, 1e300, -1e300, 1e-300, 0.0]
    )


SAMPLING_PARAMS = st.builds(
    SamplingParams,
    temperature=numbers(0, 2, 1e-30, 1e30),
    top_p=numbers(0, 1, -1.0, 7.0),
    top_k=st.integers(-1, VOCAB + 1) | st.sampled_from([2**31 - 1, 2**63 - 1, 2**63, 2**70, -(2**70)]),
    seed=st.integers(-(2**63), 2**63 - 1) | st.sampled_from([2**64, -(2**70)]),
    min_p=numbers(0, 1, -1.0, 7.0),
    presence_penalty=st.just(0.0) | numbers(-2, 2),
    frequency_penalty=st.just(0.0) | numbers(-2, 2),
    repetition_penalty=st.just(1.0) | numbers(0.01, 100, 3e-38, -1.0),
    logit_bias=st.lists(st.tuples(st.integers(-2, VOCAB + 2), numbers(-100, 100)), max_size=4).map(tuple),
    min_tokens=st.integers(0, 12),
    logprobs=st.none() | st.integers(0, VOCAB + 3),
)
ROWS = st.builds(
    Row,
    sampling=SAMPLING_PARAMS,
    position=st.integers(10, 20),
    prompt_len=st.integers(0, 10),
    seen=st.builds(Prefix.of, st.lists(st.integers(0, VOCAB - 1), max_size=6), st.integers(0, 9)),
    allowed=st.none() | st.binary(min_size=0, max_size=4),
    then=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
)
LOGITS = st.sampled_from([0.0, -3.0, 1.5, 2.0, 30.0, -1e30, 1e30]) | st.floats(-20, 20, width=32)


@examples(100)
@given(st.lists(st.tuples(ROWS, st.lists(LOGITS, min_size=VOCAB, max_size=VOCAB)), min_size=1, max_size=5))
def test_whatever_the_parameters_a_row_is_what_it_is_alone(items: list[tuple[Row, list[float]]]) -> None:
    """In range and far out of it: a token that may be, or none; no exception, and no other row's matter."""
    rows = [row for row, _ in items]
    logits = torch.tensor([line for _, line in items])
    tokens, probs, tops = sample(logits.clone(), rows, 5, frozenset({2, 3}))
    for index, row in enumerate(rows):
        [token], [prob], top = sample(logits[index : index + 1].clone(), [row], 5, frozenset({2, 3}))
        assert math.isfinite(prob) == math.isfinite(probs[index])
        assert top.get(0) == tops.get(index)
        assert 0 <= tokens[index] < VOCAB
        if math.isfinite(prob):
            assert (tokens[index], probs[index]) == (token, prob)
            assert token != 5
            assert not (row.forbids_end and token in (2, 3))
            assert row.allowed is None or int.from_bytes(row.allowed, "little") >> token & 1


@examples(70)
@given(
    temperature=st.floats(0, 2) | st.sampled_from([1e-300, 1e-8, 1e300, math.inf]),
    top_p=st.floats(0, 1),
    top_k=st.integers(-1, 2**31 - 1),
    min_p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
    line=st.lists(LOGITS, min_size=VOCAB, max_size=VOCAB),
)
def test_filters_always_leave_a_token(
    temperature: float, top_p: float, top_k: int, min_p: float, seed: int, line: list[float]
) -> None:
    sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    [token], [prob] = run(torch.tensor([line]), [(sampling, 3)])
    assert math.isfinite(prob)
    if top_k == 1 or top_p == 0.0 or (min_p == 1.0 and line.count(max(line)) == 1 and temperature <= 2):
        assert token == line.index(max(line))


def quantised(num_rows: int, vocab: int, seed: int) -> torch.Tensor:
    """Logits of bfloat16 and few levels, most of them equal to others."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, vocab, generator=generator).bfloat16() * 4).round().bfloat16() / 4


@pytest.mark.parametrize("vocab", [VOCAB, 400])
def test_of_equal_log_probabilities_the_lower_id_comes_first(vocab: int) -> None:
    """So the first of them is the token that greedy sampling chose, and as many are listed as asked for."""
    for seed in range(20):
        logits = quantised(5, vocab, seed)
        logits[4] = 0.0
        counts = [1, 2, 5, 20, 5]
        tokens, probs, tops = sample(
            logits.clone(), [Row(SamplingParams(logprobs=n), 3) for n in counts], None
        )
        for row, count in enumerate(counts):
            line = logits[row].tolist()
            ranked = sorted(range(vocab), key=lambda token: (-line[token], token))
            assert [token for token, _ in tops[row]] == ranked[:count]
            assert tops[row][0][0] == tokens[row]
            assert math.log(probs[row]) == pytest.approx(tops[row][0][1], rel=1e-12)
    assert [token for token, _ in tops[4]] == [0, 1, 2, 3, 4]


def test_top_k_ranks_as_the_log_probabilities_do() -> None:
    """At a high temperature too, where probabilities of unlike logits are the same number."""
    for seed in range(20):
        logits = quantised(1, 400, seed)
        _, _, tops = sample(logits.clone(), [Row(SamplingParams(logprobs=6), 3)], None)
        likely = {token for token, _ in tops[0]}
        rows = [(SamplingParams(temperature=t, top_k=6, seed=t), k) for t in (1, 10**7) for k in range(60)]
        tokens, _ = run(logits.expand(len(rows), -1), rows)
        assert set(tokens) == likely


def test_penalties_and_biases_of_equal_logits_choose_the_lowest_id() -> None:
    logits = torch.zeros(3, VOCAB)
    rows = [
        Row(SamplingParams(presence_penalty=1.0), 9, 0, seen=Prefix.of((0, 1, 3))),
        Row(SamplingParams(logit_bias=((7, 1.0), (4, 1.0))), 9),
        Row(SamplingParams(response_format=JsonFormat("{}")), 9, allowed=b"\xc0"),
    ]
    assert sample(logits, rows, None)[0] == [2, 4, 6]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -(2**63)])
def test_seeds_at_the_extremes_follow_the_distribution(seed: int) -> None:
    numbers = uniforms([seed] * 4000, list(range(4000)))
    assert abs(numbers.mean() - 0.5) < 5 / math.sqrt(12 * 4000)
