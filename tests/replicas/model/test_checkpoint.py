"""Loading: every layout that must load, and clear errors for what can't."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from replicas.model import checkpoint
from replicas.model.checkpoint import CheckpointError, load_weights, resolve_folder
from replicas.model.config import ModelConfig
from replicas.model.runner import TorchRunner
from tests.replicas.model.conftest import LogitsProbe, Pages, prompt, segment
from tests.tiny_checkpoint import MASK_TOKEN_ID, make_tiny_checkpoint

MASK_ROW = "base_model.model.encoder.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "model")


def load(folder: Path, **options: object) -> TorchRunner:
    return TorchRunner.load(str(folder), **{"num_pages": 20, "page_size": 8, **options})


def change(folder: Path, name: str, tensor: torch.Tensor | None, file: str = "model.safetensors") -> None:
    """Replace a tensor, or drop it."""
    tensors = load_file(folder / file)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / file)


def logits(runner: TorchRunner, *, adapter: bool = False) -> torch.Tensor:
    num_causal = 0 if adapter else None
    part = segment(prompt(20, seed=1), Pages(20, 8).table(20), num_causal=num_causal, adapter=adapter)
    return LogitsProbe(runner)(part)[0]


def test_sharded_equals_single(folder: Path, tmp_path: Path) -> None:
    sharded = make_tiny_checkpoint(tmp_path / "sharded", num_shards=3)
    assert not (sharded / "model.safetensors").exists()
    assert torch.equal(logits(load(sharded)), logits(load(folder)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_in_half_precision(folder: Path, dtype: torch.dtype) -> None:
    exact = logits(load(folder))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    found = logits(load(folder))
    assert found.dtype is torch.float32
    assert torch.nn.functional.cosine_similarity(found, exact, dim=-1).min() > 0.98


@pytest.mark.parametrize("prefix", ["base_model.model.model.", "base_model.model.", ""])
def test_adapter_under_any_prefix(folder: Path, prefix: str) -> None:
    expected = logits(load(folder), adapter=True)
    file = folder / "linear_spec_lora" / "adapter_model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        tail = name[name.index("layers.") :].replace("lora_A.weight", "lora_A.default.weight")
        renamed[prefix + tail] = tensor
    save_file(renamed, file)
    assert torch.equal(logits(load(folder), adapter=True), expected)
    assert not torch.equal(logits(load(folder), adapter=False), expected)


def test_no_adapter_folder_means_the_base_model_drafts(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "plain", adapter_targets=())
    part = segment(prompt(9, seed=1), (0, 1), num_causal=0, adapter=True)
    bare = segment(prompt(9, seed=1), (0, 1), num_causal=0, adapter=False)
    probe = LogitsProbe(load(folder))
    assert torch.equal(probe(part)[0], probe(bare)[0])


def test_missing_tensor(folder: Path) -> None:
    change(folder, "encoder.layers.1.mlp.up_proj.weight", None)
    with pytest.raises(CheckpointError, match=r"1\.mlp\.up_proj\.weight is missing.*\[72, 40\]"):
        load(folder)


def test_missing_head_of_an_untied_model(folder: Path) -> None:
    change(folder, "diffusion_head.weight", None)
    with pytest.raises(CheckpointError, match=r"diffusion_head\.weight is missing"):
        load(folder)


def test_wrong_shape(folder: Path) -> None:
    change(folder, "encoder.layers.0.self_attn.k_proj.weight", torch.zeros(24, 39))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight has shape \[24, 39\].*implies \[24, 40\]"):
        load(folder)


def test_wrong_dtype(folder: Path) -> None:
    change(folder, "encoder.norm.weight", torch.zeros(40, dtype=torch.int8))
    with pytest.raises(CheckpointError, match=r"norm\.weight has dtype int8, expected one of float32"):
        load(folder)


def test_missing_shard(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "sharded", num_shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        load(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index"):
        load(folder)


def test_broken_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(folder)


def test_too_little_memory_for_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "available_bytes", lambda: 100_000)
    with pytest.raises(CheckpointError, match=r"too little memory.*weights alone.*use bfloat16 or a smaller"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"too little memory.*weights alone.*use a smaller checkpoint"):
        load(folder, dtype="bfloat16")


def test_too_little_memory_for_the_pages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "available_bytes", lambda: 4 << 20)
    with pytest.raises(CheckpointError, match=r"and 1\.0 GiB of K/V pages.*use fewer pages \(kv_cache_mb\)"):
        load(folder, num_pages=None, kv_budget_bytes=1 << 30)
    load(folder)


def test_adapter_errors(folder: Path) -> None:
    lora = folder / "linear_spec_lora"
    name = "base_model.model.encoder.layers.1.self_attn.o_proj.lora_B.weight"
    change(lora, name, torch.zeros(40, 5), "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lora_B\.weight has shape \[40, 5\].*\[40, 6\]"):
        load(folder)
    change(lora, name, None, "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="layer 1 o_proj has no lora_B"):
        load(folder)
    change(lora, name, torch.zeros(40, 6), "adapter_model.safetensors")
    change(
        lora,
        "base_model.model.encoder.embed_tokens.lora_A.weight",
        torch.zeros(6, 97),
        "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"embed_tokens\.lora_A\.weight belongs to no projection"):
        load(folder)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora"):
        load(folder)


def test_the_mask_row_comes_with_the_adapter(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", adapter_has_mask_row=True)
    before = (folder / "model.safetensors").read_bytes()
    row = load_file(folder / "linear_spec_lora" / "adapter_model.safetensors")[MASK_ROW][0]
    weights = load_weights(folder, ModelConfig.from_folder(folder), torch.float32)
    assert torch.equal(weights.embedding[MASK_TOKEN_ID], row)
    assert (folder / "model.safetensors").read_bytes() == before


def test_no_other_row_may_be_trained(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", adapter_has_mask_row=True)
    path = folder / "linear_spec_lora" / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"trainable_token_indices": {"embed_tokens": [MASK_TOKEN_ID]}}))
    load(folder)
    for wrong in ([MASK_TOKEN_ID + 1], [MASK_TOKEN_ID, 9], {"lm_head": [MASK_TOKEN_ID]}, None):
        path.write_text(json.dumps(raw | {"trainable_token_indices": wrong}))
        with pytest.raises(CheckpointError, match=r"only the mask token's row of embed_tokens, \[5\]"):
            load(folder)


def test_options(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype must be one of float32, bfloat16"):
        load(folder, dtype="float8")
    with pytest.raises(CheckpointError, match="holds no page"):
        load(folder, num_pages=None, kv_budget_bytes=1000)
    with pytest.raises(CheckpointError, match="forward must be one of auto, native, torch"):
        load(folder, forward="cuda")
    # 3 layers, keys and values, 2 heads of 12 floats, 8 tokens a page: 4608 bytes. The native forward
    # pads pages and heads to 16.
    for forward, page_bytes in (("torch", 4608), ("native", 3 * 2 * 2 * 16 * 16 * 4)):
        spec = load(folder, num_pages=None, kv_budget_bytes=10 * page_bytes + 100, forward=forward).spec
        assert (spec.num_pages, spec.max_context) == (10, 80)
    assert load(folder, max_context=33).spec.max_context == 33
    assert load(folder, num_pages=1000).spec.max_context == 256


def test_neither_folder_nor_hub_name() -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub name"):
        resolve_folder("/no/such/folder")
