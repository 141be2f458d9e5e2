"""Checkpoints of the wider family, as transformers writes them, decode as transformers does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from policies.modes import Mode
from replicas.engine.batch import ScheduledBatch
from replicas.model.runner import TorchRunner
from tests.replicas.model.conftest import prompt, segment

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama3-rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "mistral": MistralConfig(**SHAPE, head_dim=10, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}


def save(folder: Path, config: Any) -> Any:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers(tmp_path: Path, forward: str, name: str) -> None:
    model = save(tmp_path, CONFIGS[name])
    runner = TorchRunner.load(str(tmp_path), num_pages=16, page_size=8, forward=forward)
    assert runner.spec.modes == (Mode.AR,)
    assert runner.spec.mask_token_id is None
    tokens = prompt(21, seed=1, vocab=61)
    expected = model.generate(
        torch.tensor([tokens]), max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0
    )
    pages = tuple(range(16))
    start = 0
    with torch.no_grad():
        forbidden_eos = model(expected).logits[0, 20:-1].clone()
    forbidden_eos[:, 2] = float("-inf")
    assert forbidden_eos.argmax(-1).tolist() == expected[0, 21:].tolist()
    context = expected[0].tolist()
    chosen = []
    for end in range(21, 61):
        part = segment(context[start:end], pages, start=start, wanted=(end - start - 1,))
        [output] = runner.run(ScheduledBatch((part,)))
        chosen.append(output.token_ids[0])
        start = end
    with torch.no_grad():
        plain = model(expected).logits[0, 20:-1].argmax(-1).tolist()
    assert chosen == plain
    assert len(set(chosen)) > 3
