"""Block diffusion within a grammar and under penalties, by the book: all is computed anew at every step."""

import math
from collections.abc import Callable, Set
from collections.abc import Sequence as Seq
from typing import Protocol

from policies.modes import DecodePlan
from replicas.engine.grammar import Grammar
from tests.naive_sampler import SAMPLER, places_fixed


class Model(Protocol):
    def next_token(self, context: tuple[int, ...], allowed: bytes | None) -> int:
        """The causal choice after a context, of what is allowed."""
        ...

    def guesses(
        self, prefix: tuple[int, ...], block: tuple[int, ...], counted: tuple[int, ...]
    ) -> dict[int, tuple[int, float]]:
        """For each mask of a block behind a prefix its token and probability; by their place in the block.

        counted: the tokens that penalties count
        """
        ...


def naive_diffusion(
    model: Model,
    prompt: Seq[int],
    max_tokens: int,
    plan: DecodePlan,
    *,
    mask: int,
    eos: Set[int],
    max_context: int,
    grammar: Callable[[], Grammar] | None = None,
    is_penalised: bool = False,
    max_steps: int | None = None,
    overlaps: bool = True,
) -> list[int]:
    """The completion; it ends with an end of text, where the grammar is complete, or at max_tokens."""

    def after(tokens: Seq[int]) -> Grammar | None:
        """The grammar behind these tokens; None without one."""
        following = None if grammar is None else grammar()
        for token in tokens:
            if following is not None:
                following.accept(token)
        return following

    def allowed_after(tokens: Seq[int]) -> bytes | None:
        following = after(tokens)
        return None if following is None else following.masks(())[0]

    def num_allowed(tokens: Seq[int], coming: Seq[int]) -> int:
        following = after(tokens)
        for count, token in enumerate(coming):
            if following is not None:
                is_over = following.is_complete or (count and coming[count - 1] in eos)
                if is_over or not int.from_bytes(following.masks(())[0], "little") >> token & 1:
                    return count
                following.accept(token)
        return len(coming)

    def forced_after(tokens: Seq[int]) -> tuple[int, ...]:
        following = after(tokens)
        return () if following is None or tokens[-1] in eos else following.forced(())

    def end_of(tokens: Seq[int]) -> int | None:
        """The number of tokens up to the text's end; None where it goes on."""
        following = None if grammar is None else grammar()
        for count, token in enumerate(tokens, start=1):
            if following is not None:
                following.accept(token)
            if token in eos or count == max_tokens or (following is not None and following.is_complete):
                return count
        return None

    made = [model.next_token(tuple(prompt), allowed_after([]))]
    while end_of(made) is None:
        prefix = (*prompt, *made[:-1])
        length = min(plan.block_length, max_context - len(prefix))
        block: list[int | None] = [made[-1]] + [None] * (length - 1)
        num_steps, end = 0, length
        while None in block[:end]:
            num_steps += 1
            shown = [mask if token is None else token for token in block]
            counted = list(prefix)
            if overlaps and num_steps == 1:
                shown[0] = mask
            else:
                counted.append(made[-1])
            counted += [token for token in block[1:] if token is not None and token not in eos]
            guesses = model.guesses(prefix, tuple(shown), tuple(counted))
            guesses.pop(0, None)
            ranked = sorted(guesses, key=lambda index: -guesses[index][1])
            probs = [guesses[index][1] for index in ranked]
            if plan.risk is not None:
                seen = (length, {index: prob for index, (_, prob) in guesses.items()}, shown[0] == mask)
                ranked = places_fixed(SAMPLER, math.inf, *seen)
                num_sure = len(places_fixed(SAMPLER, plan.risk, *seen))
            elif plan.threshold is not None:
                num_sure = sum(prob >= plan.threshold for prob in probs)
            else:
                counts = range(1, len(probs) + 1)
                num_sure = max([n for n in counts if (n + 1) * (1 - probs[n - 1]) < plan.factor], default=0)
            is_last = num_steps >= (max_steps or plan.block_length)
            fixed: list[int] = []
            for index in ranked[: len(ranked) if is_last else max(1, num_sure)]:
                token = guesses[index][0]
                if not is_penalised or token in eos or token not in fixed:
                    block[index] = token
                    fixed.append(token)
            while True:
                at = next((index for index in range(1, length) if block[index] is None), length)
                ends = [index + 1 for index in range(1, at) if block[index] in eos]
                at = min([at, *ends])
                final = block[1:at]
                coming = final if ends or at not in guesses else [*final, guesses[at][0]]
                count = num_allowed(made, coming)
                is_refused = count < len(coming)
                if is_refused:
                    at = 1 + min(count, len(final))
                    block[at:] = [None] * (length - at)
                forced = forced_after([*made, *block[1:at]])[: length - at]
                if not forced:
                    break
                block[at : at + len(forced)] = forced
            first_mask = next((index for index in range(1, length) if block[index] is None), length)
            if is_refused or ends:
                end = at
            elif is_last:
                end = first_mask
        made = [*made, *block[1:end]]
        if end_of(made) is None:
            made.append(model.next_token((*prompt, *made), allowed_after(made)))
    return made[: end_of(made)]
