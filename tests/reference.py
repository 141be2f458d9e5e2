"""A naive decoder over transformers' own layers: every forward recomputes everything, one sequence at a time.

It states what the three modes must give, token for token. It shares no code with the engine or the
model under test, and no cache outlives a forward.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Set
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, Ministral3Config, Ministral3ForCausalLM

from policies.modes import DecodePlan, Mode
from tests.naive_sampler import SAMPLER, places_fixed

Schedule = Callable[[int], DecodePlan]


@dataclass(frozen=True, slots=True)
class Decoded:
    """token_ids: the completion; the EOS that ended it is its last token.

    num_forwards: all but the prefill, which gives the first token. A round of self-speculation is one; a
    diffusion block costs its denoising forwards, but the one that is done in the commit of the block before
    or in the prefill, and, unless the request ends in it, one commit. Its blocks are cut to the model's
    context only, never to max_tokens.
    """

    token_ids: tuple[int, ...]
    num_forwards: int
    tokens_by_mode: dict[Mode, int]


class Reference:
    """Decodes greedily from a tri-mode checkpoint folder, in float32.

    overlaps_blocks: a block of diffusion behind the prompt, or another block of the same plan, has its first
    denoising in that forward; every block has it with its seed still masked.
    """

    def __init__(self, folder: Path | str):
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        eos = config["eos_token_id"]
        self.eos_token_ids = frozenset(eos if isinstance(eos, list) else [eos])
        self.mask_token_id: int = config["mask_token_id"]
        self.max_context: int = config["max_position_embeddings"]
        self.denoise_with_adapter: bool = config.get("denoise_with_adapter", False)
        self.overlaps_blocks = True
        self.base = _load_base(folder, config)
        self.drafter = _with_adapter(self.base, folder / "linear_spec_lora")

    @torch.no_grad()
    def causal_logits(self, token_ids: Seq[int]) -> torch.Tensor:
        """[T] -> [T, vocab]; row i predicts token i + 1."""
        return self.base(torch.tensor([list(token_ids)]), use_cache=False).logits[0]

    @torch.no_grad()
    def block_logits(self, prefix_ids: Seq[int], block_ids: Seq[int], *, adapter: bool) -> torch.Tensor:
        """[B, vocab]; row i predicts block token i itself.

        The prefix is causal and never sees the adapter; block rows see the prefix and the whole block.
        """
        cache = DynamicCache(config=self.base.config)
        if prefix_ids:
            self.base.model(torch.tensor([list(prefix_ids)]), past_key_values=cache, use_cache=True)
        see_all = torch.zeros(1, 1, len(block_ids), len(prefix_ids) + len(block_ids))
        positions = torch.arange(len(prefix_ids), len(prefix_ids) + len(block_ids))[None]
        model = self.drafter if adapter else self.base
        output = model(
            torch.tensor([list(block_ids)]),
            attention_mask=see_all,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[0]

    def ar(self, prompt_ids: Seq[int], max_tokens: int, *, ignore_eos: bool = False) -> Decoded:
        return self.mixed(prompt_ids, max_tokens, lambda _: DecodePlan(Mode.AR), ignore_eos=ignore_eos)

    def self_speculation(
        self, prompt_ids: Seq[int], max_tokens: int, block_length: int, *, ignore_eos: bool = False
    ) -> Decoded:
        plan = DecodePlan(Mode.SELF_SPECULATION, block_length)
        return self.mixed(prompt_ids, max_tokens, lambda _: plan, ignore_eos=ignore_eos)

    def diffusion(
        self,
        prompt_ids: Seq[int],
        max_tokens: int,
        block_length: int,
        threshold: float = 0.9,
        *,
        ignore_eos: bool = False,
    ) -> Decoded:
        plan = DecodePlan(Mode.DIFFUSION, block_length, threshold)
        return self.mixed(prompt_ids, max_tokens, lambda _: plan, ignore_eos=ignore_eos)

    def mixed(
        self,
        prompt_ids: Seq[int],
        max_tokens: int,
        schedule: Schedule,
        *,
        ignore_eos: bool = False,
        apart: Set[int] = frozenset(),
    ) -> Decoded:
        """schedule(n) is the plan of round n, asked at the safe point before it; the prefill is no round.

        apart: blocks of diffusion that the round before did not begin, though it could have.
        In tokens_by_mode the first token, which the prefill gives, counts for the first round's mode.
        """
        eos = frozenset() if ignore_eos else self.eos_token_ids
        seed, _ = self._choose(self.causal_logits(prompt_ids)[-1])
        tokens = [seed]
        by_mode = {schedule(0).mode: 1}
        num_forwards = 0
        round_index = 0
        before: DecodePlan | None = schedule(0)
        draft = self._draft(list(prompt_ids), schedule(0), max_tokens)
        while len(tokens) < max_tokens and tokens[-1] not in eos:
            plan = schedule(round_index)
            remaining = max_tokens - len(tokens)
            context = [*prompt_ids, *tokens]
            if plan.mode is Mode.SELF_SPECULATION:
                new, draft = self._speculate(context, plan, remaining, eos, draft)
                forwards = 1
            else:
                is_begun = self.overlaps_blocks and plan == before and round_index not in apart
                new, forwards = self._round(context, plan, remaining, eos, is_begun)
                draft = []
            end = next((i + 1 for i, token in enumerate(new) if token in eos), len(new))
            new = new[: min(end, remaining)]
            tokens += new
            by_mode[plan.mode] = by_mode.get(plan.mode, 0) + len(new)
            num_forwards += forwards
            round_index += 1
            before = plan
        return Decoded(tuple(tokens), num_forwards, by_mode)

    def _round(
        self, context: list[int], plan: DecodePlan, remaining: int, eos: frozenset[int], is_begun: bool
    ) -> tuple[list[int], int]:
        """One round of ar or diffusion after `context`, whose last token is the seed: new tokens and
        forwards.

        is_begun: in the forward before, where it is diffusion.
        """
        prefix, seed = context[:-1], context[-1]
        length = min(plan.block_length, self.max_context - len(prefix))
        block = [seed] + [self.mask_token_id] * (length - 1)
        if plan.mode is Mode.DIFFUSION:
            num_denoisings = self._denoise(prefix, block, plan, eos, is_begun)
            fixed = block[1:]
            ended = len(fixed) >= remaining or self.mask_token_id in fixed or any(t in eos for t in fixed)
            if ended:
                return fixed, num_denoisings
            return fixed + self._causal_choices(prefix, block)[-1:], num_denoisings + 1
        return self._causal_choices(prefix, [seed]), 1

    def _speculate(
        self,
        context: list[int],
        plan: DecodePlan,
        remaining: int,
        eos: frozenset[int],
        draft: list[tuple[int, float]],
    ) -> tuple[list[int], list[tuple[int, float]]]:
        """A forward that verifies some of the draft and makes the next one: new tokens, and that draft."""
        most = draft[: min(plan.block_length, remaining, self.max_context - len(context) + 1) - 1]
        end = next((i + 1 for i, (token, _) in enumerate(most) if token in eos), len(most))
        verified = [token for token, _ in most[: self._worth([prob for _, prob in most[:end]])]]
        choices = self._causal_choices(context[:-1], [context[-1], *verified])
        for index, token in enumerate(verified):
            if token != choices[index]:
                return choices[: index + 1], []
        if verified and verified[-1] in eos:
            return choices, []
        return choices, self._draft([*context, *verified], plan, remaining - len(choices))

    def _worth(self, probs: list[float]) -> int:
        """How many drafted tokens to verify: most expected tokens, a refusal costing those of a whole
        draft."""
        whole = sum(math.prod(probs[:count]) for count in range(1, len(probs) + 1))
        best, best_value = 0, 0.0
        for count in range(1, len(probs) + 1):
            value = sum(math.prod(probs[:k]) for k in range(1, count + 1))
            value -= (1 - math.prod(probs[:count])) * whole
            if value >= best_value:
                best, best_value = count, value
        return best

    def _draft(self, causal: list[int], plan: DecodePlan, remaining: int) -> list[tuple[int, float]]:
        """The draft behind the tokens of `causal`: of those after the next one, each with its probability.

        remaining: tokens still to come, the next one included
        """
        length = min(plan.block_length, remaining, self.max_context - len(causal))
        if plan.mode is not Mode.SELF_SPECULATION or length < 2:
            return []
        logits = self.block_logits(causal, [self.mask_token_id] * length, adapter=True)
        return [self._choose(row) for row in logits[1:]]

    def _denoise(
        self, prefix: list[int], block: list[int], plan: DecodePlan, eos: frozenset[int], is_begun: bool
    ) -> int:
        """Fill the masks of `block` in place; returns the number of forwards of its own."""
        masked = set(range(1, len(block)))
        num_forwards = 0

        def ended() -> bool:
            first_mask = min(masked, default=len(block))
            return not masked or any(token in eos for token in block[1:first_mask])

        while not ended():
            hides_seed = self.overlaps_blocks and num_forwards == 0
            seen = [self.mask_token_id, *block[1:]] if hides_seed else block
            logits = self.block_logits(prefix, seen, adapter=self.denoise_with_adapter)
            num_forwards += 1
            choices = {index: self._choose(logits[index]) for index in sorted(masked)}
            for index in self._fixed(plan, choices, len(block), hides_seed):
                block[index] = choices[index][0]
                masked.discard(index)
        return num_forwards - (1 if is_begun and num_forwards else 0)

    def _fixed(
        self, plan: DecodePlan, choices: dict[int, tuple[int, float]], length: int, hides_seed: bool
    ) -> list[int]:
        """The places of a block that a denoising fixes, of these tokens and probabilities."""
        probs = {index: prob for index, (_, prob) in choices.items()}
        if plan.risk is not None:
            return places_fixed(SAMPLER, plan.risk, length, probs, hides_seed)
        surest = sorted(probs, key=lambda index: probs[index], reverse=True)
        num_fixed = 1
        for count, index in enumerate(surest, start=1):
            if plan.threshold is not None:
                is_fixed = probs[index] >= plan.threshold
            else:
                is_fixed = (count + 1) * (1.0 - probs[index]) < plan.factor
            num_fixed = count if is_fixed else num_fixed
        return surest[:num_fixed]

    def _causal_choices(self, prefix: list[int], block: list[int]) -> list[int]:
        logits = self.causal_logits([*prefix, *block])[len(prefix) :]
        return [self._choose(row)[0] for row in logits]

    def _choose(self, logits: torch.Tensor) -> tuple[int, float]:
        """The most likely token but the mask, and its probability among all but the mask."""
        allowed = logits.clone()
        allowed[self.mask_token_id] = -math.inf
        token = int(allowed.argmax())
        return token, float(torch.softmax(allowed, dim=-1)[token])


def _load_base(folder: Path, config: dict) -> Ministral3ForCausalLM:
    known = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    model_config = Ministral3Config(**known)
    model_config._attn_implementation = "eager"
    model = Ministral3ForCausalLM(model_config).to(torch.float32).eval()
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    renamed = {re.sub(r"^encoder\.", "model.", name): tensor.float() for name, tensor in tensors.items()}
    if "diffusion_head.weight" in renamed:
        renamed["lm_head.weight"] = renamed.pop("diffusion_head.weight")
    else:
        renamed["lm_head.weight"] = renamed["model.embed_tokens.weight"]
    model.load_state_dict(renamed, strict=True)
    return model


def _with_adapter(base: Ministral3ForCausalLM, folder: Path) -> Ministral3ForCausalLM:
    """A copy of the model with the adapter merged into its weights; the model itself without one."""
    if not folder.is_dir():
        return base
    config = json.loads((folder / "adapter_config.json").read_text())
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    tensors = load_file(folder / "adapter_model.safetensors")
    merged = copy.deepcopy(base)
    mask_row = tensors.pop("base_model.model.encoder.embed_tokens.token_adapter.trainable_tokens_delta", None)
    if mask_row is not None:
        merged.model.embed_tokens.weight.data[config["trainable_token_indices"]] = mask_row.float()
    for name, down in tensors.items():
        if ".lora_A" not in name:
            continue
        up = tensors[name.replace(".lora_A", ".lora_B")]
        path = re.search(r"layers\.\d+\..*?_proj", name)
        assert path is not None
        linear = merged.get_submodule(f"model.{path[0]}")
        linear.weight.data += scale * (up.float() @ down.float())
    return merged
