"""The whole recipe in one command that may be stopped and started again: sample, train, export.

`python -m training.smollm2.job`, on a GPU where there is one; docs/smollm2.md says how to prepare it
and what it takes. Everything it makes is in --out:

    documents-*.safetensors, held-out.safetensors   answers by the base, made once
    state.pt, log.jsonl                             the state that training goes on from, and its log
    parts/                                          the adapter so far, in parts, and progress.json
    linear_spec_lora/                               the adapter, at the end
"""

import argparse
import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from training.smollm2.documents import Documents, Prompts
from training.smollm2.export import FILE, export, restore
from training.smollm2.model import AdaptedModel
from training.smollm2.parts import join, split
from training.smollm2.sample import sample
from training.smollm2.train import TrainConfig, Trainer


@dataclass(frozen=True)
class SampleConfig:
    """The sampling of answers; it ends after max_documents or minutes, whichever is first."""

    minutes: float = 4.0
    max_documents: int = 400_000
    rows: int = 2048
    """Answers sampled at a time."""
    max_new_tokens: int = 256
    low: float = 0.7
    """The lowest temperature; temperatures are uniform in [low, high]."""
    high: float = 1.0
    greedy_share: float = 0.25
    """The share of answers sampled greedily, since acceptance is measured on greedy decoding."""
    seed: int = 0


@dataclass(frozen=True)
class JobConfig:
    """The settings of one call of the job."""

    base: Path
    prompts: Path
    out: Path
    rank: int = 64
    """The adapter's rank."""
    stop_after_minutes: float = math.inf
    """The time that this call may take, sampling included; a later one goes on."""
    compiled: bool = True
    sampling: SampleConfig = field(default_factory=SampleConfig)
    training: TrainConfig = field(default_factory=TrainConfig)


def sample_documents(model: AdaptedModel, config: JobConfig, eos_id: int) -> None:
    """Makes held-out.safetensors and documents-*.safetensors, unless documents.json says they are there."""
    done, sampling, device = config.out / "documents.json", config.sampling, model.embedding.device
    if done.is_file():
        return
    held_out = Prompts.load(config.prompts, "held_out")
    generator = torch.Generator(device).manual_seed(sampling.seed)
    with torch.compiler.set_stance("force_eager"):
        greedy = sample(
            model, held_out, torch.zeros(len(held_out)), sampling.max_new_tokens, eos_id, generator
        )
    greedy.save(config.out / "held-out.safetensors")
    prompts = Prompts.load(config.prompts, "train")
    began, num_documents, num_tokens, batch = time.monotonic(), 0, 0, 0
    bar = tqdm(total=sampling.max_documents, unit="answer", mininterval=5)
    while batch == 0 or (
        num_documents < sampling.max_documents and time.monotonic() - began < 60 * sampling.minutes
    ):
        path = config.out / f"documents-{batch:04d}.safetensors"
        if not path.is_file():
            generator.manual_seed(sampling.seed * 1_000_003 + batch)
            first = batch * sampling.rows
            wanted = torch.arange(first, first + min(sampling.rows, sampling.max_documents - num_documents))
            chosen = prompts.rows(wanted % len(prompts))
            uniform = torch.rand(2, len(chosen), generator=generator, device=device)
            spread = sampling.low + (sampling.high - sampling.low) * uniform[0]
            temperatures = torch.where(uniform[1] < sampling.greedy_share, 0.0, spread)
            sample(model, chosen, temperatures, sampling.max_new_tokens, eos_id, generator).save(path)
        made = Documents.load([path])
        num_documents, num_tokens, batch = (
            num_documents + len(made),
            num_tokens + made.num_answer_tokens,
            batch + 1,
        )
        bar.update(len(made))
    bar.close()
    seconds = round(time.monotonic() - began)
    counts = {"documents": num_documents, "answer_tokens": num_tokens, "seconds": seconds}
    done.write_text(json.dumps(counts) + "\n")
    print(json.dumps(counts))


def run(config: JobConfig) -> bool:
    """Runs the job; returns True if training has come to its end and linear_spec_lora/ is there."""
    began = time.monotonic()
    config.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    longest = Prompts.load(config.prompts, "train").ids.shape[1] + config.sampling.max_new_tokens
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AdaptedModel.load(config.base, config.rank, 2 * longest + 64, dtype, config.training.seed).to(
        device
    )
    if config.compiled and device.type == "cuda":
        model.compile_layers()
    (eos_id,) = model.config.eos_token_ids
    sample_documents(model, config, eos_id)
    torch.cuda.empty_cache()  # sampling's cache is large, and of no use to training
    documents = Documents.load(sorted(config.out.glob("documents-*.safetensors"))).to(device)
    held_out = Documents.load([config.out / "held-out.safetensors"])
    trainer = Trainer(model, documents, held_out, config.training, eos_id)
    if not (config.out / "state.pt").is_file():
        _resume_from_parts(trainer, config.out)

    def save_parts() -> None:
        parts, exported = config.out / "parts", config.out / "export"
        export(model, exported)
        split(exported / FILE, parts)
        shutil.copy(exported / "adapter_config.json", parts)
        progress = {"step": trainer.step, "minutes": trainer.minutes}
        (parts / "progress.json").write_text(json.dumps(progress) + "\n")

    left = config.stop_after_minutes - (time.monotonic() - began) / 60
    if not trainer.train(config.out, left, on_save=save_parts):
        return False
    export(model, config.out / "linear_spec_lora")
    return True


def _resume_from_parts(trainer: Trainer, out: Path) -> None:
    """Goes on from what another machine saved, if its parts are in out/parts; the optimizer starts anew."""
    progress = out / "parts" / "progress.json"
    if not progress.is_file():
        return
    join(out / "parts", FILE, out / FILE)
    restore(trainer.model, out / FILE)
    saved = json.loads(progress.read_text())
    trainer.step, trainer.minutes = saved["step"], saved["minutes"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="the converted checkpoint (make model)")
    parser.add_argument("--prompts", type=Path, required=True, help="from training.smollm2.prompts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=TrainConfig.minutes, help="of training, in all")
    parser.add_argument("--sample-minutes", type=float, default=SampleConfig.minutes)
    parser.add_argument("--stop-after-minutes", type=float, default=math.inf, help="of this call")
    parser.add_argument("--rows", type=int, default=TrainConfig.rows, help="documents in a forward")
    parser.add_argument("--sample-rows", type=int, default=SampleConfig.rows)
    parser.add_argument("--accumulate", type=int, default=TrainConfig.accumulate)
    parser.add_argument("--learning-rate", type=float, default=TrainConfig.learning_rate)
    parser.add_argument("--rank", type=int, default=JobConfig.rank)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    a = parser.parse_args()
    config = JobConfig(
        a.base,
        a.prompts,
        a.out,
        a.rank,
        a.stop_after_minutes,
        a.compiled,
        SampleConfig(minutes=a.sample_minutes, rows=a.sample_rows, seed=a.seed),
        TrainConfig(
            minutes=a.minutes,
            rows=a.rows,
            accumulate=a.accumulate,
            learning_rate=a.learning_rate,
            seed=a.seed,
        ),
    )
    print("finished" if run(config) else "stopped; start it again to go on")


if __name__ == "__main__":
    main()
