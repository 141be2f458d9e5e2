"""What a checkpoint's files say is checked when it is loaded, by an error that names file and key."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from replicas.engine.batch import ScheduledBatch
from replicas.model.checkpoint import CheckpointError, load_weights
from replicas.model.config import ModelConfig
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from tests.replicas.model.conftest import Pages, prompt, segment
from tests.tiny_checkpoint import (
    byte_fallback_tokenizer,
    make_tiny_checkpoint,
    write_byte_fallback_checkpoint,
)

SIZE = len(byte_fallback_tokenizer())
NAN, INF = float("nan"), float("inf")
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 64.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_fallback_checkpoint(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy whose files may be changed."""
    for path in sound.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def change(folder: Path, file: str, **fields: Any) -> None:
    path = folder / file
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(raw | fields))


def load(folder: Path) -> TorchRunner:
    return TorchRunner.load(str(folder), num_pages=70, page_size=16)


def test_the_sound_one_loads(folder: Path) -> None:
    spec = load(folder).spec
    assert (spec.vocab_size, spec.eos_token_ids, spec.mask_token_id) == (SIZE, {2}, 3)
    TextCodec.load(str(folder))


BAD_IDS = [
    SIZE,
    SIZE + 400,
    10**30,
    -1,
    True,
    "2",
    2.0,
    [[2]],
    [2, -1],
    [2, SIZE],
    [2, None],
    {"id": 2},
    ["</s>"],
]


@pytest.mark.parametrize("value", BAD_IDS, ids=str)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ends_of_text(folder: Path, file: str, value: Any) -> None:
    change(folder, file, eos_token_id=value)
    with pytest.raises(CheckpointError, match=rf"^{file}: eos_token_id must be in \[0, .* {SIZE}\), got"):
        load(folder)


@pytest.mark.parametrize("key", ["bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [SIZE + 13, -1, True, "0", [[1]]], ids=str)
def test_other_special_tokens(folder: Path, file: str, key: str, value: Any) -> None:
    change(folder, file, **{key: value})
    with pytest.raises(CheckpointError, match=rf"^{file}: {key} must be in"):
        load(folder)


@pytest.mark.parametrize("value", [SIZE, -1, True, "3", [3], 3.0], ids=str)
def test_the_mask_is_in_the_tokenizers_vocabulary(folder: Path, value: Any) -> None:
    change(folder, "config.json", mask_token_id=value)
    with pytest.raises(CheckpointError, match=r"^config.json: mask_token_id must be in"):
        load(folder)


def test_the_mask_is_no_end_of_text(folder: Path) -> None:
    change(folder, "generation_config.json", eos_token_id=[2, 3])
    with pytest.raises(CheckpointError, match="mask_token_id must not be an end of text as well, got 3"):
        load(folder)


@pytest.mark.parametrize("value", ["</end>", 2, ["</s>"], {"content": 2}, {"content": "</t>"}])
def test_an_end_of_text_that_the_tokenizer_has_not_got(folder: Path, value: Any) -> None:
    change(folder, "tokenizer_config.json", eos_token=value)
    with pytest.raises(
        CheckpointError, match=r"^tokenizer_config.json: eos_token .* is not in the vocabulary"
    ):
        load(folder)


def test_a_mask_that_the_tokenizer_has_not_got(folder: Path) -> None:
    change(folder, "tokenizer_config.json", mask_token="<mask>")
    with pytest.raises(CheckpointError, match=r"^tokenizer_config.json: mask_token '<mask>' is not in the"):
        load(folder)


@pytest.mark.parametrize("value", ["</s>", {"content": "</s>", "special": True}])
def test_an_end_of_text_that_only_the_tokenizer_knows_is_one(folder: Path, value: Any) -> None:
    change(folder, "config.json", eos_token_id=None)
    change(folder, "tokenizer_config.json", eos_token=value)
    assert load(folder).spec.eos_token_ids == {2}
    change(folder, "generation_config.json", eos_token_id=[7, 9])
    assert load(folder).spec.eos_token_ids == {2, 7, 9}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"num_attention_heads": True}, "num_attention_heads must be a positive integer, got True"),
        ({"num_hidden_layers": -3}, "num_hidden_layers must be a positive"),
        ({"hidden_size": 40.0}, "hidden_size must be a positive integer, got 40.0"),
        ({"intermediate_size": None}, "intermediate_size must be a positive"),
        ({"head_dim": "12"}, "head_dim must be a positive"),
        ({"num_key_value_heads": [2]}, "num_key_value_heads must be a positive"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be a positive"),
        ({"block_size": 0}, "block_size must be a positive"),
        ({"vocab_size": -1}, "vocab_size must be a positive"),
        ({"sliding_window": "64"}, "sliding_window must be a positive"),
        ({"rms_norm_eps": NAN}, "rms_norm_eps must be a number of at least 1e-30 and at most 1, got nan"),
        ({"rms_norm_eps": INF}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ({"layer_types": 3}, "layer_types 3 are not supported"),
        ({"layer_types": [["full_attention"]]}, "layer_types"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"full_attention": YARN}}, "rope_parameters by kind of layer is not supported"),
        ({"rope_parameters": YARN | {"rope_type": 3}}, "rope_type 3 is not supported"),
        ({"rope_parameters": YARN | {"rope_theta": NAN}}, "rope_parameters.rope_theta must be a number"),
        ({"rope_parameters": YARN | {"rope_theta": 0}}, "rope_parameters.rope_theta must be a number"),
        ({"rope_parameters": YARN | {"rope_theta": "1e6"}}, "rope_parameters.rope_theta must be a number"),
        ({"rope_parameters": YARN | {"factor": None}}, "rope_parameters.factor must be a number"),
        ({"rope_parameters": YARN | {"factor": INF}}, "rope_parameters.factor must be a number"),
        (
            {"rope_parameters": YARN | {"factor": 0.5}},
            "rope_parameters.factor must be a number of at least 1",
        ),
        (
            {"rope_parameters": YARN | {"factor": 4.0}},
            "factor must be at least max_position_embeddings 1024 /",
        ),
        (
            {"rope_parameters": YARN | {"beta_fast": 0.5}},
            "rope_parameters.beta_fast must be at least beta_slow",
        ),
        ({"rope_parameters": YARN | {"beta_slow": "1"}}, "rope_parameters.beta_slow must be a number"),
        ({"rope_parameters": YARN | {"mscale": NAN}}, "rope_parameters.mscale must be a number"),
        ({"rope_parameters": YARN | {"attention_factor": -1}}, "rope_parameters.attention_factor must be"),
        ({"rope_parameters": YARN | {"truncate": 1}}, "rope_parameters.truncate must be true or false"),
        ({"rope_parameters": YARN | {"llama_4_scaling_beta": INF}}, "llama_4_scaling_beta must be a number"),
        (
            {"rope_parameters": YARN | {"original_max_position_embeddings": 0}},
            "rope_parameters.original_max_position_embeddings must be a positive",
        ),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor must be a number"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor must be above low"),
        (
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": None}},
            "original_max_position_embeddings must be a positive",
        ),
    ],
    ids=str,
)
def test_shapes_and_ranges(folder: Path, fields: dict[str, Any], message: str) -> None:
    change(folder, "config.json", **fields)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(caught.value).startswith("config.json: ")
    assert message in str(caught.value)


def test_a_context_within_yarns_is_the_models_own_choice(folder: Path) -> None:
    change(folder, "config.json", rope_parameters=YARN | {"factor": 128.0})
    assert load(folder).spec.max_context == 1024


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize(
    "content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b""], ids=lambda raw: repr(raw[:5])
)
def test_what_is_no_json_object_is_named(folder: Path, file: str, content: bytes) -> None:
    (folder / file).unlink(missing_ok=True)
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file} (is not valid JSON|must hold a JSON object)"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None}, "model.vocab must be"),
        ({"model": {"vocab": 3}}, "model.vocab must be"),
        ({"added_tokens": ["</s>"]}, "added_tokens must be objects"),
        ({"added_tokens": [{"content": "</s>", "id": "2"}]}, "the id of token '</s>' must be an integer"),
        ({"added_tokens": [{"content": "</s>"}]}, "the id of token '</s>' must be an integer"),
    ],
)
def test_a_tokenizer_that_is_none(folder: Path, fields: dict[str, Any], message: str) -> None:
    change(folder, "tokenizer.json", **fields)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("weights", [None, 3, {}, {"a": 3}, {"a": "../model.safetensors"}])
def test_an_index_that_names_no_files(folder: Path, weights: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(CheckpointError, match="weight_map"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("r", 0), ("r", True), ("r", "6"), ("lora_alpha", NAN), ("lora_alpha", True), ("use_rslora", "no")],
)
def test_an_adapters_numbers(tmp_path: Path, key: str, value: Any) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    change(folder / "linear_spec_lora", "adapter_config.json", **{key: value})
    with pytest.raises(CheckpointError, match=rf"linear_spec_lora/adapter_config.json: {key} must be"):
        TorchRunner.load(str(folder), num_pages=20, page_size=8)


@pytest.mark.parametrize("forward", ["torch", "native"])
@pytest.mark.parametrize("tied", [False, True])
def test_padded_rows_are_never_sampled(tmp_path: Path, forward: str, tied: bool) -> None:
    """They would be the most probable by far. The other logits are those of the checkpoint without them."""
    folder = write_byte_fallback_checkpoint(tmp_path / "model", num_padded_rows=19, tie_word_embeddings=tied)
    tensors = load_file(folder / "model.safetensors")
    for name in ("encoder.embed_tokens.weight", "diffusion_head.weight"):
        if name in tensors:
            assert len(tensors[name]) == SIZE + 19
            tensors[name][SIZE:] = 50 * tensors["encoder.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    config = ModelConfig.from_folder(folder)
    assert (config.vocab_size, config.num_padded_rows) == (SIZE, 19)
    weights = load_weights(folder, config, torch.float32)
    assert (len(weights.head), weights.head is weights.embedding) == (SIZE, tied)
    runner = TorchRunner.load(str(folder), num_pages=70, page_size=16, forward=forward)
    part = segment(prompt(30, seed=1), Pages(70, 16).table(30), wanted=tuple(range(30)))
    (output,) = runner.run(ScheduledBatch((part,)))
    assert all(token < SIZE for token in output.token_ids)
    assert sum(output.probs) > 0.1
