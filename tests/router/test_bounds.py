"""Nothing at a router grows with what clients invent."""

import asyncio
import random
from dataclasses import replace

from replicas.engine.blocks import PagePool
from replicas.errors import TriadError
from replicas.messages import DecodingOptions, DecodingReport, Finished, GenerateRequest, SamplingParams
from router.prefix_map import CHUNK_CHARS, MAX_ENTRIES, MAX_HOLDERS, PrefixMap, prefix_keys
from router.prompt_estimator import MAX_CHARS_A_TOKEN, MIN_CHARS_A_TOKEN, PromptEstimator
from tests.eventually import eventually
from tests.router.conftest import running
from tests.router.fakes import ScriptedReplica
from tests.router.test_dispatch import a_request, whole


async def test_a_thousand_requests_of_all_kinds_leave_nothing_behind(start):
    """Of thresholds, blocks, salts, prompts and priorities of their own; answered, refused, and given up."""
    rng = random.Random(3)
    replicas = [ScriptedReplica("a"), ScriptedReplica("b")]
    dispatcher = await start(*replicas)

    async def ask(number: int) -> None:
        request = replace(
            a_request(f"r{number}"),
            prompts=(f"{number} " * CHUNK_CHARS,) * rng.randint(1, 2),
            decoding=DecodingOptions(block_length=2 + number % 63, threshold=0.5 + number / 100_003),
            cache_salt=f"salt {number}",
            priority=number,
        )
        task = asyncio.create_task(whole(dispatcher, request))
        if number % 3 == 0:
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async with running(replicas[0].run()), running(replicas[1].run()):
        for first in range(0, 1000, 8):
            await asyncio.gather(*(ask(number) for number in range(first, first + 8)))
        await eventually(lambda: not any(replica.live for replica in replicas))
        await eventually(
            lambda: not any(each._to_cancel for each in dispatcher._connections._connections.values())
        )
    traffic = dispatcher._traffic
    assert dispatcher.in_flight() == {"a": 0, "b": 0}
    assert not any(traffic._sent.values())
    assert set(traffic._in_flight) <= {"a", "b"}
    assert dispatcher._connections._watch._failing == {}
    assert dispatcher._num_unsure == 0
    assert len(dispatcher._estimator._prefixes) <= MAX_ENTRIES


async def test_a_thousand_refusals_leave_nothing_behind(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica)
    for number in range(1000):
        request = GenerateRequest(f"r{number}", "", ((1,) * 5000,), SamplingParams())
        try:
            await whole(dispatcher, request)
        except TriadError:
            continue
        raise AssertionError("it fits no context")
    assert replica.submitted == []
    assert dispatcher._traffic.num_in_flight == 0


def test_the_memory_of_prompts_has_its_bound_and_forgets_the_oldest():
    prefixes = PrefixMap(max_entries=1000)
    for number in range(3000):
        for replica_id in "abcdef":
            prefixes.sent(prefix_keys("x" * CHUNK_CHARS, f"salt {number}"), replica_id, float(number))
    assert len(prefixes) == 1000
    assert max(map(len, prefixes._holders.values())) == MAX_HOLDERS
    assert prefixes.held(prefix_keys("x" * CHUNK_CHARS, "salt 0"), 3000.0) == {}
    assert len(prefixes.held(prefix_keys("x" * CHUNK_CHARS, "salt 2999"), 3000.0)) == MAX_HOLDERS


def test_a_cache_knows_no_more_salts_than_it_has_pages():
    pool = PagePool(16, 2)
    for number in range(1000):
        pages = pool.allocate(1)
        assert pages is not None
        pool.keep(pages[0], f"salt {number}", (1, 2))
        pool.release(pages)
        assert pool.find([1, 2], f"salt {number}")[0] == pages
        pool.release(pages)
    pool.check_integrity([])
    assert len(pool._page_of) == len(pool._number_of) == 16


def test_odd_texts_make_no_nonsense_of_the_sizes_of_others():
    estimator = PromptEstimator()
    ordinary = replace(a_request(), prompts=("x" * 4000,))
    for _ in range(1000):
        estimator.finished(
            replace(a_request(), prompts=(" " * 10**6,)), Finished("r", 1, 1, DecodingReport())
        )
    assert estimator.prompt_lens(ordinary, 1024)[0] >= 4000 / MAX_CHARS_A_TOKEN - 1
    for _ in range(1000):
        estimator.finished(replace(a_request(), prompts=("x",)), Finished("r", 10**6, 1, DecodingReport()))
    assert estimator.prompt_lens(ordinary, 1024)[0] <= 4000 / MIN_CHARS_A_TOKEN + 1
