"""The tokens that penalties count, as segments have them."""

import pickle

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.batch import ScheduledBatch, SegmentOutput
from replicas.engine.engine import Engine
from replicas.engine.history import FEW_TOKENS, Counts, History, Prefix
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import ScriptedRunner


def by_definition(token_ids: list[int], prompt_len: int) -> dict[int, int]:
    """How often the completion has each of the tokens."""
    return {token: token_ids[prompt_len:].count(token) for token in set(token_ids)}


def as_dict(counts: Counts) -> dict[int, int]:
    assert (np.diff(counts.ids) > 0).all()
    return dict(zip(counts.ids.tolist(), counts.times.tolist(), strict=True))


class HistoryCheck(ScriptedRunner):
    """Compares each segment's history with the tokens whose slots the sequence's page table holds."""

    num_checked = 0

    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        size = self.spec.page_size
        for segment in batch.segments:
            if segment.sampling.has_penalties and segment.wanted:
                cached = [self._slots[segment.pages[p // size]][p % size] for p in range(segment.start)]
                first = segment.wanted[0] if segment.num_causal else 0
                seen = [*cached, *segment.token_ids[: first + 1]]
                assert segment.history.token_ids.tolist() == seen
                assert as_dict(segment.history.counts) == by_definition(seen, segment.prompt_len)
                self.num_checked += 1
            else:
                assert not segment.history
        return super().run(batch)


def test_a_segments_history_is_what_all_its_wanted_rows_see() -> None:
    """In every mode with penalties, over chunks of prompts, rejected drafts and preemptions."""
    runner = HistoryCheck(num_pages=30)
    engine = Engine(runner, EngineConfig(max_running=8, max_prefill_tokens=16))
    sequences = []
    for index in range(12):
        mode = (Mode.AR, Mode.SELF_SPECULATION)[index % 2]
        penalty = 1.3 if index % 3 else 1.0
        sampling = SamplingParams(max_tokens=30, ignore_eos=True, repetition_penalty=penalty)
        prompt_ids = [3 + (index * k) % 50 for k in range(10 + 3 * index)]
        options = DecodingOptions(mode, 6 if mode is Mode.SELF_SPECULATION else None)
        sequences.append(engine.submit(str(index), prompt_ids, sampling, options))
    while engine.has_work:
        engine.step()
    assert sum(sequence.num_preemptions for sequence in sequences) > 0
    assert all(sequence.num_completion_tokens == 30 for sequence in sequences)
    assert runner.num_checked > 100


TOKENS = st.lists(st.integers(0, 9) | st.integers(0, 200_000), max_size=3 * FEW_TOKENS)


@settings(deadline=None)
@given(TOKENS, st.lists(st.tuples(TOKENS, st.integers(0, 4 * FEW_TOKENS)), max_size=8), st.data())
def test_counts_are_those_of_the_first_tokens_whatever_was_asked_before(
    prompt_ids: list[int], steps: list[tuple[list[int], int]], data: st.DataObject
) -> None:
    """Lengths go up by few tokens and by many, and down as in a preemption; counts given stay the same."""
    history, tokens = History(prompt_ids, len(prompt_ids)), list(prompt_ids)
    given_before = []
    for new, back in steps:
        for token in new:
            history.append(token)
        tokens += new
        prefix = history.first(max(0, len(tokens) - back))
        given_before.append((prefix.counts, by_definition(tokens[: len(prefix)], len(prompt_ids))))
        assert as_dict(pickle.loads(pickle.dumps(prefix)).counts) == given_before[-1][1]
        for counts, expected in given_before:
            assert as_dict(counts) == expected
    vocab_size = data.draw(st.integers(0, 11))
    below = history.first(len(tokens)).counts.below(vocab_size)
    expected = by_definition(tokens, len(prompt_ids))
    assert as_dict(below) == {token: times for token, times in expected.items() if token < vocab_size}


def test_a_few_more_tokens_are_counted_without_those_before() -> None:
    """Else each step would take as long as its context."""
    history = History(range(1000), 10)
    history.first(1000).counts  # noqa: B018
    history._token_ids[500] = 7  # as if it had never been 500
    for token in range(FEW_TOKENS):
        history.append(token)
    assert 500 in as_dict(history.first(1000 + FEW_TOKENS).counts)
    assert 500 not in as_dict(Prefix.of(history.token_ids(1000)).counts)


@given(st.lists(st.integers(0, 99), max_size=6), st.lists(st.integers(0, 99), max_size=6))
def test_prefixes_compare_by_their_tokens_in_another_process_too(one, other):
    prefix = Prefix.of(one, 2)
    assert pickle.loads(pickle.dumps(prefix)) == prefix
    assert hash(pickle.loads(pickle.dumps(prefix))) == hash(prefix)
    assert (Prefix.of(other) == prefix) == (one == other)
