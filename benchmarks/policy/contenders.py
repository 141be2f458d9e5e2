"""What is compared: `auto` and the fixed settings, and the prompts that all of them answer."""

from typing import Any

from benchmarks.load import PROMPTS as QUESTIONS
from benchmarks.modes import held_out_prompts
from policies.modes import LOSSLESS_MODES, Mode

AUTO = "auto"
"""The contender whose mode the server's policy chooses."""
FIXED: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    **{
        f"self_speculation {block}": {"mode": "self_speculation", "block_length": block}
        for block in (8, 16, 32)
    },
    **{f"diffusion {block}": {"mode": "diffusion", "block_length": block} for block in (8, 16, 32)},
}
"""The `decoding` of the contenders that pin their mode, by name."""
QUICK = ("ar", "self_speculation 16", "diffusion 16")
WORKLOADS = ("fixed-length", "held-out", "mixed")


def name_of(mode: str, block_length: int) -> str:
    """The contender of a plan, whether FIXED has it or not."""
    return mode if mode == Mode.AR else f"{mode} {block_length}"


def is_lossless(contender: str) -> bool:
    return contender in FIXED and Mode(FIXED[contender]["mode"]) in LOSSLESS_MODES


def prompts(workload: str) -> list[str]:
    """The prompts of a workload.

    fixed-length, held-out: held-out ones of the embedded model's task families, which alternate; mixed: every
    second one a question that the model has not learned to answer, so that its drafts survive less often
    """
    known = held_out_prompts()
    if workload != "mixed":
        return known
    foreign = [
        f"{opening}{question}"
        for opening in ("", "Please: ", "Tell me. ", "I ask you: ", "Now, ")
        for question in QUESTIONS
    ]
    return [prompt for pair in zip(known, foreign, strict=False) for prompt in pair]


def ignores_eos(workload: str) -> bool:
    """True where every answer has max_tokens tokens; in the others it ends where the model ends it."""
    return workload == "fixed-length"


def rotated(contenders: tuple[str, ...], by: int) -> tuple[str, ...]:
    by %= len(contenders)
    return contenders[by:] + contenders[:by]
