"""The whole recipe at tiny scale: what it samples, that it learns, that stopping changes nothing, and that
the engine serves what comes out of it in all three modes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from policies.modes import DecodePlan, Mode
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from tests.reference import Reference
from tests.tiny_checkpoint import EOS_TOKEN_ID, MASK_TOKEN_ID, VOCAB_SIZE
from tests.training.smollm2.tiny import make_base
from training.smollm2 import job
from training.smollm2.blocks import BlockConfig
from training.smollm2.documents import Documents, Prompts
from training.smollm2.export import FILE, restore
from training.smollm2.job import JobConfig, SampleConfig, run
from training.smollm2.model import AdaptedModel
from training.smollm2.parts import join
from training.smollm2.train import TrainConfig, Trainer, accepted_length, learning_rate_scale

SAMPLING = SampleConfig(minutes=5, max_documents=96, rows=40, max_new_tokens=40, greedy_share=0.5)
TRAINING = TrainConfig(
    minutes=None,
    steps=40,
    rows=24,
    accumulate=2,
    num_noisy=40,
    learning_rate=0.01,
    warmup_steps=5,
    log_every=10,
    accepted_block=4,
    blocks=BlockConfig(lengths=(2, 4, 8)),
)


def prompts(num: int, seed: int) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (num,), generator=generator).tolist()
    return Prompts.of(
        [torch.randint(6, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths], pad_id=0, width=8
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    """Of a job not yet run. The base has few likely tokens, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("job")
    base = make_base(folder / "base", seed=5)
    Prompts.save(folder / "prompts.safetensors", {"train": prompts(64, 1), "held_out": prompts(12, 2)})
    return JobConfig(
        base, folder / "prompts.safetensors", folder / "out", rank=8, sampling=SAMPLING, training=TRAINING
    )


@pytest.fixture(scope="module")
def finished(config: JobConfig) -> JobConfig:
    assert run(config)
    return config


def served(config: JobConfig, folder: Path) -> Path:
    """The checkpoint with the trained adapter in it."""
    shutil.copytree(config.base, folder)
    shutil.copytree(config.out / "linear_spec_lora", folder / "linear_spec_lora")
    return folder


def log(config: JobConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]


def test_it_learns(finished: JobConfig) -> None:
    entries = log(finished)
    assert [entry["step"] for entry in entries] == list(range(10, 41, 10))
    assert entries[-1]["loss"] < 0.8 * entries[0]["loss"]
    assert entries[-1]["accepted"] > entries[0]["accepted"]


def test_documents(finished: JobConfig) -> None:
    files = sorted(finished.out.glob("documents-*.safetensors"))
    assert [len(Documents.load([file])) for file in files] == [40, 40, 16]
    documents = Documents.load(files)
    source = Prompts.load(finished.prompts, "train")
    for row in range(0, 96, 5):
        length = int(documents.prompt_lens[row])
        assert length == int(source.lengths[row % 64])
        assert torch.equal(documents.ids[row, :length], source.ids[row % 64, :length])
        end = int(documents.lengths[row])
        answer = documents.ids[row, length:end]
        assert bool(documents.ended[row]) == (int(answer[-1]) == EOS_TOKEN_ID)
        assert not bool((answer[:-1] == EOS_TOKEN_ID).any())
    counts = json.loads((finished.out / "documents.json").read_text())
    assert (counts["documents"], counts["answer_tokens"]) == (96, documents.num_answer_tokens)


def test_the_engine_serves_the_adapter_in_all_modes(finished: JobConfig, tmp_path: Path) -> None:
    folder = served(finished, tmp_path / "served")
    reference = Reference(folder)
    engine = Engine(TorchRunner.load(str(folder), num_pages=64, page_size=8))
    assert set(engine.spec.modes) == set(Mode)
    held_out = Prompts.load(finished.prompts, "held_out")
    for plan in (
        DecodePlan(Mode.AR),
        DecodePlan(Mode.SELF_SPECULATION, 4),
        DecodePlan(Mode.DIFFUSION, 8, 0.9),
    ):
        for row in range(3):
            prompt = held_out.ids[row, : held_out.lengths[row]].tolist()
            block = None if plan.mode is Mode.AR else plan.block_length
            options = DecodingOptions(plan.mode, block, plan.threshold)
            made = engine.submit(f"{plan.mode}-{row}", prompt, SamplingParams(max_tokens=24), options)
            while engine.has_work:
                engine.step()
            expected = reference.mixed(prompt, 24, lambda _, p=plan: p)
            assert tuple(made.tokens[len(prompt) :]) == expected.token_ids


def test_accepted_length_is_that_of_the_engine(finished: JobConfig, tmp_path: Path) -> None:
    """Counted block by block with the reference, on the same greedy answers."""
    reference = Reference(served(finished, tmp_path / "served"))
    model = AdaptedModel.load(finished.base, 8, 200, torch.float32)
    restore(model, finished.out / "linear_spec_lora" / FILE)
    held_out = Documents.load([finished.out / "held-out.safetensors"]).rows(torch.arange(4))
    agreed = counted = 0
    for row in range(4):
        ids = held_out.ids[row].tolist()
        for start in range(int(held_out.prompt_lens[row]), int(held_out.lengths[row]) - 3):
            block = [ids[start], *[reference.mask_token_id] * 3]
            logits = reference.block_logits(ids[:start], block, adapter=True)
            drafts = [reference._choose(logits[index])[0] for index in (1, 2, 3)]
            wrong = [draft != ids[start + 1 + k] for k, draft in enumerate(drafts)]
            agreed += 1 + (wrong.index(True) if True in wrong else 3)
            counted += 1
    assert accepted_length(model, held_out, 4, rows=3) == pytest.approx(agreed / counted)


def trainer(config: JobConfig, training: TrainConfig) -> Trainer:
    model = AdaptedModel.load(config.base, config.rank, 200, torch.float32, training.seed)
    documents = Documents.load(sorted(config.out.glob("documents-*.safetensors")))
    held_out = Documents.load([config.out / "held-out.safetensors"])
    return Trainer(model, documents, held_out, training, EOS_TOKEN_ID)


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that moves on at every look at it."""
    ticks = count()
    return lambda: seconds * next(ticks)


def test_stopping_and_starting_changes_nothing(finished: JobConfig, tmp_path: Path) -> None:
    """Stopped after every few steps and begun anew from the files, it ends in the same weights."""
    training = replace(TRAINING, steps=14)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = trainer(finished, training)
    assert whole.train(tmp_path / "whole")
    calls = 1
    while not (last := trainer(finished, training)).train(tmp_path / "parts", 0.2, clock=ticking(1.0)):
        calls += 1
        assert calls < 10
    assert calls > 1
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, last.model.state_dict()[name]), name


@pytest.mark.parametrize("log_every", [1, 2, 100])
def test_a_stop_keeps_every_step(finished: JobConfig, tmp_path: Path, log_every: int) -> None:
    """Whether or not the last step had an entry in the log."""
    training = replace(TRAINING, rows=2, accumulate=1, log_every=log_every, save_minutes=1e6)
    stopped = trainer(finished, training)
    assert not stopped.train(tmp_path, 0.1, clock=ticking(1.0))
    assert stopped.step > 1
    assert torch.load(tmp_path / "state.pt")["step"] == stopped.step


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_is_not_saved(
    finished: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    broken = trainer(finished, replace(TRAINING, log_every=log_every))
    monkeypatch.setattr(broken, "run_step", lambda: torch.tensor(torch.nan))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        broken.train(tmp_path, 0.1, clock=ticking(1.0))
    assert not (tmp_path / "state.pt").exists()


def test_the_time_bounds_the_training(finished: JobConfig, tmp_path: Path) -> None:
    timed = trainer(finished, replace(TRAINING, steps=None, minutes=1.0, log_every=4, save_minutes=0.4))
    saves = count()
    assert timed.train(tmp_path, clock=ticking(2.0), on_save=lambda: next(saves))
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert entries[-1]["step"] == timed.step, "the end has an entry, whatever the step"
    assert "accepted" in entries[-1]
    assert entries[-1]["minutes"] >= 1
    assert timed.minutes >= 1
    assert next(saves) >= 3
    with pytest.raises(ValueError, match="minutes or steps"):
        replace(TRAINING, minutes=1.0)


def test_parts_are_the_adapter_and_go_on_elsewhere(finished: JobConfig, tmp_path: Path) -> None:
    parts = finished.out / "parts"
    assert json.loads((parts / "progress.json").read_text())["step"] == 40
    join(parts, FILE, tmp_path / FILE)
    exported = finished.out / "linear_spec_lora" / FILE
    assert (tmp_path / FILE).read_bytes() == exported.read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(parts, elsewhere / "parts")
    shutil.copy(finished.out / "documents-0000.safetensors", elsewhere)
    shutil.copy(finished.out / "held-out.safetensors", elsewhere)
    (elsewhere / "documents.json").write_text("{}")
    assert run(replace(finished, out=elsewhere)), "nothing is left to do"
    assert (elsewhere / "linear_spec_lora" / FILE).read_bytes() == exported.read_bytes()


def test_the_script(finished: JobConfig, tmp_path: Path) -> None:
    """On the base that it has converted, from its options to the adapter; stopped, then started again."""
    out, pieces = tmp_path / "out", tmp_path / "pieces"
    pieces.mkdir()
    shutil.copy(finished.prompts, pieces / "prompts.safetensors")
    shutil.copytree(finished.base, out / "base")
    script = Path(job.__file__).with_name("job.sh")
    options = [
        "--minutes=0.05",
        "--sample-minutes=0",
        "--sample-rows=4",
        "--rows=2",
        "--accumulate=1",
        "--rank=2",
    ]

    def start(*more: str) -> str:
        command = ["bash", str(script), str(pieces), str(out), *options, *more]
        environment = os.environ | {"PYTHON": sys.executable}
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout

    assert "stopped; start it again" in start("--stop-after-minutes=0")
    assert "finished" in start()
    assert json.loads((out / "documents.json").read_text())["documents"] == 4
    config = json.loads((out / "linear_spec_lora" / "adapter_config.json").read_text())
    assert (config["r"], config["trainable_token_indices"]) == (2, [MASK_TOKEN_ID])
    assert config == json.loads((out / "parts" / "adapter_config.json").read_text())


def test_the_learning_rate() -> None:
    config = replace(TRAINING, warmup_steps=10, decay_share=0.5)
    assert learning_rate_scale(0, 0.0, config) == pytest.approx(0.1)
    assert learning_rate_scale(50, 0.5, config) == 1
    assert learning_rate_scale(90, 0.75, config) == pytest.approx(0.5)
    assert learning_rate_scale(99, 1.0, config) == 0
