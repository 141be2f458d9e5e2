"""Trains the adapter on the base's own answers, bounded by time, and goes on where it was stopped.

A step is a pure function of (seed, step) and the state before it. The base runs causally over a row without
gradients, as when serving; the noisy half then runs with the adapter over the base's K/V (model.py), and its
loss is against the row's own tokens and the base's distributions (loss.py).
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.smollm2.blocks import BlockConfig, draw_blocks
from training.smollm2.documents import Documents
from training.smollm2.loss import ChunkLoss, chunk_loss, distillation_loss
from training.smollm2.model import AdaptedModel


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. It ends by time or by count: one of `minutes` and `steps` is given."""

    minutes: float | None = 18.0
    """The time of training, over all runs of it, what is compiled at first included."""
    steps: int | None = None
    """The number of steps, which makes a run repeatable."""
    rows: int = 128
    """Documents in a forward."""
    accumulate: int = 2
    """Forwards a step."""
    num_noisy: int = 256
    """Positions of the noisy half."""
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    """Steps over which the learning rate warms up."""
    decay_share: float = 0.5
    """The last share of the training, in which the learning rate falls linearly to zero."""
    max_gradient_norm: float = 1.0
    seed: int = 0
    log_every: int = 20
    save_minutes: float = 2.0
    accepted_block: int = 8
    """The block length at which the accepted length is measured."""
    blocks: BlockConfig = field(default_factory=BlockConfig)

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give minutes or steps, one of the two")

    def progress(self, step: int, minutes: float) -> float:
        """The share of the training that is done, 1 at its end."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return minutes / self.minutes


def learning_rate_scale(step: int, progress: float, config: TrainConfig) -> float:
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return warm * max(0.0, min(1.0, (1 - progress) / config.decay_share))


def batch_loss(
    model: AdaptedModel,
    documents: Documents,
    config: TrainConfig,
    eos_id: int,
    generator: torch.Generator,
    chunk: ChunkLoss = chunk_loss,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of losses over the documents' noisy halves, and the sum of the weights."""
    blocks = draw_blocks(
        documents.ids,
        documents.prompt_lens,
        documents.lengths,
        documents.ended,
        config.blocks,
        generator,
        num_noisy=config.num_noisy,
        mask_id=model.mask_token_id,
        eos_id=eos_id,
    )
    clean, cached = model.clean(documents.ids)
    noisy = model.noisy(blocks.ids, blocks.positions, blocks.mask, cached)
    row, column = blocks.weights.nonzero(as_tuple=True)
    before = (blocks.positions[row, column] - 1).clamp(max=clean.shape[1] - 1)
    weights = blocks.weights[row, column]
    loss = distillation_loss(
        noisy[row, column],
        clean[row, before],
        model.embedding,
        blocks.targets[row, column],
        weights,
        blocks.shares[row, column],
        model.mask_token_id,
        chunk,
    )
    return loss, weights.sum()


@torch.no_grad()
def accepted_length(model: AdaptedModel, documents: Documents, block_length: int, rows: int) -> float:
    """Tokens a draft-and-verify round at this block length: the drafts that agree, and the token after them.

    documents: greedy answers, so that their tokens are what verification says

    Every block that lies in an answer counts, from every offset of it; the rounds of a real decoding begin
    where the one before ended.
    """
    model_device = model.embedding.device
    agreed = counted = 0
    for start in range(0, len(documents), rows):
        part = documents.rows(torch.arange(start, min(start + rows, len(documents)))).to(model_device)
        _, cached = model.clean(part.ids)
        num_blocks = (part.ids.shape[1] - int(part.prompt_lens.min())) // block_length
        index = torch.arange(max(1, num_blocks) * block_length, device=model_device).expand(len(part), -1)
        same = index[0, :, None] // block_length == index[0, None, :] // block_length
        for offset in range(block_length):
            positions = part.prompt_lens[:, None] + offset + index
            first = positions - index % block_length
            tokens = part.ids.gather(1, positions.clamp(max=part.ids.shape[1] - 1))
            ids = torch.where(index % block_length == 0, tokens, model.mask_token_id)
            to_clean = torch.arange(part.ids.shape[1], device=model_device) < first[:, :, None]
            mask = torch.cat((to_clean, same.expand(len(part), -1, -1)), dim=2)
            drafts = model.logits(model.noisy(ids, positions, mask, cached)).argmax(-1)
            right = ((drafts == tokens) | (index % block_length == 0)).view(len(part), -1, block_length)
            prefix = right.cumprod(-1).sum(-1)
            valid = (first + block_length <= part.lengths[:, None]).view(len(part), -1, block_length)[..., 0]
            agreed += int(prefix[valid].sum())
            counted += int(valid.sum())
    return agreed / max(1, counted)


class Trainer:
    """A training run and its state.

    documents: on the model's device
    held_out: greedy answers to prompts that no document answers
    """

    def __init__(
        self, model: AdaptedModel, documents: Documents, held_out: Documents, config: TrainConfig, eos_id: int
    ) -> None:
        self.model, self.documents, self.held_out = model, documents, held_out
        self.config, self.eos_id = config, eos_id
        on_gpu = model.embedding.device.type == "cuda"
        self.chunk: ChunkLoss = torch.compile(chunk_loss, dynamic=False) if on_gpu else chunk_loss
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.step = 0
        self.minutes = 0.0

    def save(self, path: Path) -> None:
        """Writes the state whole or not at all."""
        state = {
            "step": self.step,
            "minutes": self.minutes,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        state: dict[str, Any] = torch.load(path, map_location=self.model.embedding.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.minutes = state["step"], state["minutes"]

    @property
    def progress(self) -> float:
        return self.config.progress(self.step, self.minutes)

    def run_step(self) -> Tensor:
        """Runs one step, without counting it; returns the mean loss a unit of weight, still on the device."""
        config, model = self.config, self.model
        device = model.embedding.device
        generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + self.step)
        total = torch.zeros((), device=device)
        weight = torch.zeros((), device=device)
        for _ in range(config.accumulate):
            index = torch.randint(len(self.documents), (config.rows,), generator=generator, device=device)
            part = self.documents.rows(index)
            loss, weights = batch_loss(model, part, config, self.eos_id, generator, self.chunk)
            loss.backward()
            total += loss.detach()
            weight += weights
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= weight
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
        scale = learning_rate_scale(self.step, self.progress, config)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total / weight

    def train(
        self,
        out: Path,
        stop_after_minutes: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        on_save: Callable[[], None] = lambda: None,
    ) -> bool:
        """Trains to the end, or for stop_after_minutes of this call; returns True if the end is reached.

        Goes on from out/state.pt where it is; writes it, and out/log.jsonl, as it goes. on_save is called
        after each time. Raises FloatingPointError for a loss that is not finite; the state saved last stays.
        """
        state = out / "state.pt"
        if state.is_file():
            self.load(state)
        began, before = clock(), self.minutes
        saved, saved_step, losses = began, self.step, list[Tensor]()
        bar = tqdm(
            total=1.0, initial=min(1.0, self.progress), bar_format="{l_bar}{bar}| {postfix}", mininterval=5
        )
        while self.progress < 1 and (clock() - began) / 60 < stop_after_minutes:
            losses.append(self.run_step())
            self.step += 1
            self.minutes = before + (clock() - began) / 60
            if self.step % self.config.log_every == 0 or self.progress >= 1:
                loss = self._mean(losses)
                losses.clear()
                bar.set_postfix_str(f"step {self.step} loss {loss:.3f}", refresh=False)
                bar.update(min(1.0, self.progress) - bar.n)
                entry = {"step": self.step, "minutes": round(self.minutes, 2), "loss": round(loss, 4)}
                due = clock() - saved > 60 * self.config.save_minutes
                if due or self.step == self.config.log_every or self.progress >= 1:
                    entry["accepted"] = round(self.accepted(), 3)
                    self.save(state)
                    on_save()
                    saved, saved_step = clock(), self.step
                with (out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(entry) + "\n")
        bar.close()
        if self.step != saved_step:
            if losses:
                self._mean(losses)
            self.save(state)
            on_save()
        return self.progress >= 1

    def _mean(self, losses: list[Tensor]) -> float:
        """The mean loss; waits for the device, so the clock is right after it. Raises FloatingPointError."""
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}")
        return loss

    def accepted(self) -> float:
        with torch.compiler.set_stance("force_eager"):  # its shapes are not worth compiling for
            return accepted_length(self.model, self.held_out, self.config.accepted_block, self.config.rows)
