"""Trains the embedded checkpoint: `python -m training.train --out DIR`.

Tokenizer, training and export in one command; run again with the same --out it goes on where it stopped.
With `--from CHECKPOINT` it goes on from an exported checkpoint's weights and tokenizer instead, with fresh
optimizers, as for tasks that have been added. With `torchrun` several processes learn together
(training.parallel), each from batches of its own.
A first phase is AR only (the paper starts from an AR model too), then comes the joint objective. The learning
rate warms up, stays, and falls linearly to zero over the last part of the steps.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from training.batches import Batch, DataConfig, encode_chat, make_batch
from training.export import export
from training.model import ModelConfig, TriModel
from training.muon import BatchedMuon, multiplies_bfloat16
from training.objective import clean_mask
from training.parallel import Ranks, join, leave
from training.tasks.family import Chat
from training.tasks.registry import ALL_FAMILIES, held_out_tasks
from training.tokenizer import load_tokenizer, train_tokenizer


@dataclass(frozen=True)
class TrainConfig:
    """The recipe; lengths of phases in steps."""

    steps: int = 4200
    ar_steps: int = 1000
    decay_steps: int = 1200
    warmup_steps: int = 100
    noisy_weight: float = 0.3
    muon_lr: float = 0.01
    adam_lr: float = 0.002
    weight_decay: float = 0.01
    seed: int = 0
    tokenizer_chats: int = 30000
    vocab_size: int = 2048
    eval_every: int = 200
    save_every: int = 200
    eval_per_family: int = 24
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=0))
    """The model's sizes; the vocab_size becomes the tokenizer's."""


def learning_rate_scale(step: int, config: TrainConfig) -> float:
    """The learning rate's factor: warm-up, stable, linear decay to zero at `config.steps`."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return warm * min(1.0, (config.steps - step) / max(1, config.decay_steps))


def make_optimizers(model: TriModel, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, head and norms."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n]
    vectors = [p for n, p in model.named_parameters() if p.dim() < 2]
    tables = [p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." not in n]
    muon = BatchedMuon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=0.95)
    adam = torch.optim.AdamW(
        [{"params": tables, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.adam_lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    return [muon, adam]


def losses(model: TriModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The AR loss per answer token and the masked-token loss per noisy position, both scalars."""
    device = batch.ids.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=multiplies_bfloat16(device)):
        hidden = model(batch.ids, batch.positions, batch.clean_mask, batch.noisy_mask)
        logits = model.logits(hidden).flatten(0, 1)
    num_clean = batch.clean_mask.shape[-1]
    each = nn.functional.cross_entropy(logits.float(), batch.targets.flatten(), reduction="none")
    each = each.view(batch.ids.shape)
    ar = (each * batch.ar_weights).sum() / batch.ar_weights.sum()
    if batch.noisy_mask is None:
        return ar, torch.zeros_like(ar)
    noisy = (each * batch.noisy_weights).sum() / batch.noisy_weights.sum()
    assert num_clean < batch.ids.shape[1]
    return ar, noisy


@torch.no_grad()
def teacher_forced_exact(
    model: TriModel, tokenizer: Tokenizer, per_family: int, device: torch.device
) -> dict[str, float]:
    """The share of held-out tasks, by family, whose whole answer is the argmax at each place.

    That equals greedy AR decoding giving the reference answer exactly.
    """
    scores = {}
    for family in ALL_FAMILIES:
        chats = [
            Chat([*t.chat.messages, {"role": "assistant", "content": t.answer}], t.chat.tools)
            for t in held_out_tasks(family, per_family)
        ]
        documents = [encode_chat(tokenizer, chat) for chat in chats]
        longest = max(len(d.ids) for d in documents)
        ids = torch.zeros(len(documents), longest, dtype=torch.int64)
        for row, document in enumerate(documents):
            ids[row, : len(document.ids)] = torch.tensor(document.ids)
        numbers = (ids != 0).long()
        positions = torch.arange(longest).expand_as(ids)
        hidden = model(ids.to(device), positions.to(device), clean_mask(numbers).to(device))
        guesses = model.logits(hidden).argmax(-1).cpu()
        right = 0
        for row, document in enumerate(documents):
            start, end = document.answers[-1]
            right += bool((guesses[row, start - 1 : end - 1] == ids[row, start:end]).all())
        scores[family] = right / len(documents)
    return scores


def prefetched(
    config: TrainConfig, tokenizer: Tokenizer, first: int, last: int, ranks: Ranks
) -> Iterator[Batch]:
    """This rank's batches of steps first..last, each made while the step before it runs."""
    with ThreadPoolExecutor(max_workers=1) as pool:

        def make(step: int) -> Batch:
            number, joint = ranks.numbered(step), step >= config.ar_steps
            return make_batch(config.data, tokenizer, config.seed, number, joint)

        upcoming = pool.submit(make, first)
        for step in range(first, last):
            batch = upcoming.result()
            if step + 1 < last:
                upcoming = pool.submit(make, step + 1)
            yield batch


def save_state(path: Path, step: int, model: TriModel, optimizers: list[torch.optim.Optimizer]) -> None:
    state = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(
    config: TrainConfig,
    out: Path,
    start: Path | None = None,
    compiled: bool = True,
    progress: bool = True,
    stop_at: int | None = None,
) -> TriModel:
    """Trains to `config.steps`, from `out/state.pt` where there is one; exports to `out/checkpoint`.

    start: an exported checkpoint whose weights and tokenizer to begin with; None: from nothing
    stop_at: the step before which to stop, its state saved, as if interrupted
    """
    ranks, device = join()
    try:
        return _train(config, out, start, compiled, progress and ranks.is_first, stop_at, ranks, device)
    finally:
        leave()


def _train(
    config: TrainConfig,
    out: Path,
    start: Path | None,
    compiled: bool,
    progress: bool,
    stop_at: int | None,
    ranks: Ranks,
    device: torch.device,
) -> TriModel:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_path = out / "tokenizer.json"
    if ranks.is_first and not tokenizer_path.exists():
        if start is not None:
            shutil.copy(start / "tokenizer.json", tokenizer_path)
        else:
            train_tokenizer(config.tokenizer_chats, config.vocab_size, config.seed).save(str(tokenizer_path))
    ranks.wait()
    tokenizer = load_tokenizer(tokenizer_path)
    torch.manual_seed(config.seed)
    model = TriModel(replace(config.model, vocab_size=tokenizer.get_vocab_size())).to(device)
    optimizers = make_optimizers(model, config)
    first = 0
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
    elif start is not None:
        model.load_published(load_file(start / "model.safetensors"))
    last = config.steps if stop_at is None else stop_at
    base_lrs = [config.muon_lr, config.adam_lr]
    step_losses = torch.compile(losses, dynamic=False) if compiled else losses
    bar = tqdm(range(first, last), initial=first, total=config.steps, disable=not progress, mininterval=10)
    log = (out / "log.jsonl").open("a")
    batches = prefetched(config, tokenizer, first, last, ranks)
    parameters = list(model.parameters())
    started, tokens, recent = time.time(), 0, []
    for step in bar:
        batch = next(batches).to(device)
        ar, noisy = step_losses(model, batch)
        (ar + config.noisy_weight * noisy).backward()
        ranks.average_gradients(parameters)
        scale = learning_rate_scale(step, config)
        for optimizer, base in zip(optimizers, base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += batch.num_tokens * ranks.size
        recent.append((ar.item(), noisy.item()))
        if not math.isfinite(recent[-1][0]):
            raise FloatingPointError(f"loss is not finite at step {step}")
        done = step + 1
        if done % 20 == 0:
            bar.set_postfix_str(f"ar {recent[-1][0]:.3f} noisy {recent[-1][1]:.3f}", refresh=False)
        if not ranks.is_first:
            continue
        if done % config.save_every == 0 or done == last:
            save_state(out / "state.pt", done, model, optimizers)
        if done % config.eval_every == 0 or done == last:
            exact = teacher_forced_exact(model, tokenizer, config.eval_per_family, device)
            entry = {
                "step": done,
                "seconds": round(time.time() - started),
                "tokens": tokens,
                "ar": round(sum(r[0] for r in recent) / len(recent), 4),
                "noisy": round(sum(r[1] for r in recent) / len(recent), 4),
                "exact": round(sum(exact.values()) / len(exact), 3),
                "families": {k: round(v, 2) for k, v in exact.items()},
            }
            recent = []
            log.write(json.dumps(entry) + "\n")
            log.flush()
            if progress:
                tqdm.write(json.dumps(entry))
    log.close()
    if ranks.is_first:
        export(model, tokenizer, out / "checkpoint")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--from", dest="start", type=Path, metavar="CHECKPOINT", help="go on from its weights"
    )
    default = TrainConfig()
    for name in ("steps", "ar_steps", "decay_steps", "warmup_steps", "eval_every", "save_every", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    for name in ("muon_lr", "adam_lr"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(default, name))
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="stop there, to go on with other shares")
    parser.add_argument("--rows", type=int, default=default.data.rows, help="of a batch, for each process")
    parser.add_argument("--drill-share", type=float, default=default.data.drill_share)
    parser.add_argument("--tool-share", type=float, default=default.data.tool_share)
    parser.add_argument("--first-weight", type=float, default=default.data.first_weight)
    parser.add_argument("--share", action="append", default=[], metavar="FAMILY=WEIGHT")
    arguments = vars(parser.parse_args())
    out, start, stop_at = (arguments.pop(name) for name in ("out", "start", "stop_at"))
    shares = tuple((s.split("=")[0], float(s.split("=")[1])) for s in arguments.pop("share"))
    data = DataConfig(
        rows=arguments.pop("rows"),
        shares=shares or default.data.shares,
        drill_share=arguments.pop("drill_share"),
        tool_share=arguments.pop("tool_share"),
        first_weight=arguments.pop("first_weight"),
    )
    config = TrainConfig(**arguments, data=data)
    print(json.dumps(asdict(config)))
    train(config, out, start, stop_at=stop_at)


if __name__ == "__main__":
    main()
