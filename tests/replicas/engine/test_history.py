"""The tokens that penalties count, as segments have them."""

from policies.modes import Mode
from replicas.engine.batch import ScheduledBatch, SegmentOutput
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import ScriptedRunner


class HistoryCheck(ScriptedRunner):
    """Compares each segment's history with the tokens whose slots the sequence's page table holds."""

    num_checked = 0

    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        size = self.spec.page_size
        for segment in batch.segments:
            if segment.sampling.has_penalties and segment.wanted:
                cached = [self._slots[segment.pages[p // size]][p % size] for p in range(segment.start)]
                seen = segment.history.token_ids.tolist()
                assert seen[: segment.start] == cached
                assert (
                    seen[segment.start :]
                    == list(segment.token_ids[: segment.wanted[0] + 1])[: len(seen) - segment.start]
                )
                assert len(seen) > segment.start
                self.num_checked += 1
            else:
                assert not segment.history
        return super().run(batch)


def test_a_segments_history_is_what_is_cached_before_it() -> None:
    """In every mode with penalties, over chunks of prompts, rejected drafts and preemptions."""
    runner = HistoryCheck(num_pages=30)
    engine = Engine(runner, max_running=8, max_prefill_tokens=16)
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
