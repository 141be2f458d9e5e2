"""What a grammar forces takes no forward of its own in the lossless modes, and changes no token, whatever it
says."""

from collections.abc import Sequence as Seq
from random import Random

import pytest

from policies.modes import Mode
from replicas.answer_forms import JsonFormat
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.grammar import GrammarFailed
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import VOCAB, ScriptedGrammar, ScriptedRunner, naive_ar, tokens_of
from tests.replicas.engine.test_engine import drain
from tests.thorough import num_cases

FORM = JsonFormat("{}")


class Lying(ScriptedGrammar):
    """Says at random what is forced, which may be refused, or fails."""

    def __init__(self, num_tokens: int, rng: Random):
        super().__init__(num_tokens)
        self._rng = rng

    def forced(self, tokens: Seq[int]) -> tuple[int, ...]:
        if self._rng.random() < 0.1:
            raise GrammarFailed("no telling")
        return tuple(self._rng.randrange(3, VOCAB) for _ in range(self._rng.randrange(4)))


def run(grammar: ScriptedGrammar, prompt: list[int], max_tokens: int, mode: Mode) -> tuple[list[int], int]:
    engine = Engine(ScriptedRunner(), EngineConfig())
    sampling = SamplingParams(max_tokens=max_tokens, response_format=FORM)
    sequence = engine.submit("a", prompt, sampling, DecodingOptions(mode), grammar=grammar)
    return tokens_of(drain(engine)["a"]), sequence.num_forwards


@pytest.mark.parametrize("mode", [Mode.AR, Mode.SELF_SPECULATION])
def test_forced_tokens_take_no_forward_of_their_own(mode: Mode) -> None:
    tokens, num_forwards = run(ScriptedGrammar(40), [7, 8], 40, mode)
    assert tokens == naive_ar([7, 8], 40, grammar=ScriptedGrammar(40))
    forced = [at for at in range(1, len(tokens)) if at % 8 in (6, 7)]
    assert forced
    if mode is Mode.AR:
        assert num_forwards == len(tokens) - 1 - len(forced)
    else:
        assert num_forwards <= len(tokens) - 1 - len(forced)


@pytest.mark.parametrize("mode", [Mode.AR, Mode.SELF_SPECULATION])
def test_what_is_forced_is_verified(mode: Mode) -> None:
    for seed in range(num_cases(40)):
        rng = Random(seed)
        prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 9))]
        num_tokens, max_tokens = rng.randint(1, 60), rng.randint(1, 60)
        tokens, _ = run(Lying(num_tokens, rng), prompt, max_tokens, mode)
        assert tokens == naive_ar(prompt, max_tokens, grammar=ScriptedGrammar(num_tokens)), seed
