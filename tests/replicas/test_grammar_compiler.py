"""Schemas are compiled in processes of their own first: what does not end there is refused."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from replicas.answer_forms import JsonFormat
from replicas.bounded_process import CallLimits
from replicas.errors import ErrorCode, TriadError
from replicas.grammar_compiler import MAX_REFUSALS, GrammarCompiler
from tests.replicas.codec import byte_codec, tiny_tokenizer
from tests.replicas.test_grammar import EOS, VOCAB_SIZE, grammar_of

TRAPS = "tests.replicas.bounded_targets:prover_with_traps"
SMALL = CallLimits(cpu_s=0.5, memory_bytes=64 * 2**20)


def guarded(**limits: float) -> GrammarCompiler:
    backend = tiny_tokenizer().backend_tokenizer
    return GrammarCompiler(backend.to_str(), VOCAB_SIZE, {EOS}, limits=replace(SMALL, **limits), target=TRAPS)


@pytest.mark.parametrize("trap", ["never comes back", "eats memory", "dies"])
def test_a_schema_that_does_not_compile_within_bounds_is_refused_and_stays_so(trap: str) -> None:
    mine = guarded()
    asked = JsonFormat(json.dumps({"title": trap}))
    with pytest.raises(
        TriadError, match=r"too complex to compile within 0\.5 s of CPU time and 64 MiB"
    ) as caught:
        mine.compile(asked)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert caught.value.param == "response_format.json_schema.schema"
    assert "strict" not in caught.value.message
    mine.close()  # so that no process can be asked again
    for ask in (mine.known, mine.compile):
        with pytest.raises(TriadError, match="too complex to compile"):
            ask(asked)
    with pytest.raises(TriadError, match="shutting down"):
        mine.compile(JsonFormat("{}"))


def test_other_schemas_are_compiled_beside_one_that_does_not_come_back() -> None:
    mine = guarded(cpu_s=60.0)
    mine.compile(JsonFormat("{}"))
    with ThreadPoolExecutor(1) as thread:
        stuck = thread.submit(mine.compile, JsonFormat('{"title": "never comes back"}'))
        for number in range(3):
            mine.compile(JsonFormat(f'{{"enum": [{number}]}}'))
        assert mine.known(JsonFormat("{}")) is not None
        assert not stuck.done()
        mine.close()
        with pytest.raises(TriadError, match="shutting down"):
            stuck.result(timeout=20)


def test_a_compile_that_has_too_small_a_share_of_the_machine_may_be_tried_again() -> None:
    mine = guarded(wall_s=0.3)
    asked = JsonFormat('{"title": "sleeps"}')
    for _ in range(2):
        with pytest.raises(TriadError, match="too busy") as caught:
            mine.compile(asked)
        assert caught.value.code is ErrorCode.QUEUE_FULL
    mine.compile(JsonFormat("{}"))
    mine.close()


def test_refusals_are_kept_up_to_a_bound() -> None:
    mine = byte_codec().grammars(VOCAB_SIZE, frozenset({EOS}))
    for number in range(MAX_REFUSALS + 5):
        with pytest.raises(TriadError):
            mine.compile(JsonFormat(f'{{"enum": [], "$comment": "{number}"}}', best_effort=True))
    assert len(mine._refused) == MAX_REFUSALS
    mine.close()


def test_compiled_grammars_are_kept_up_to_a_bound_of_memory() -> None:
    """Each takes 100 MiB, by the word of its process, and one that says so 200."""
    backend = tiny_tokenizer().backend_tokenizer
    target = "tests.replicas.bounded_targets:prover_of_sizes"
    mine = GrammarCompiler(backend.to_str(), VOCAB_SIZE, {EOS}, target=target)
    schemas = [JsonFormat(f'{{"enum": [{number}]}}') for number in range(4)]
    for asked in schemas:
        mine.compile(asked)
    assert [mine.known(asked) is not None for asked in schemas] == [False, False, True, True]
    with pytest.raises(TriadError, match="too complex: compiled it takes 200 MiB"):
        mine.compile(JsonFormat('{"title": "large"}'))
    mine.close()


@pytest.mark.parametrize(
    ("schema", "is_given"),
    [
        ({"type": "array", "uniqueItems": True}, True),
        ({"not": {"type": "string"}}, True),
        ({"const": 2**53 + 1}, True),
        ({"type": "bogus"}, False),
        ({"enum": []}, False),
        ({"$ref": "#/$defs/none"}, False),
    ],
)
def test_the_hint_of_strict_is_given_where_it_is_true(schema: dict, is_given: bool) -> None:
    with pytest.raises(TriadError) as caught:
        grammar_of(schema)
    assert ('"strict": false' in caught.value.message) is is_given
    if is_given:
        grammar_of(schema, best_effort=True)
    else:
        with pytest.raises(TriadError):
            grammar_of(schema, best_effort=True)
