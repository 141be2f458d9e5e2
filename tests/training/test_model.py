"""The training model is Ministral 3, and its export is the published format."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Ministral3Config, Ministral3ForCausalLM

from training.batches import encode_chat
from training.export import config_json, export
from training.model import ModelConfig, TriModel
from training.tasks.family import Chat
from training.tokenizer import BOS_ID, EOS_ID, MASK_ID, train_tokenizer

CONFIG = ModelConfig(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_layers=3, num_heads=6, num_kv_heads=2,
    max_position_embeddings=128,
)  # fmt: skip


def ministral(model: TriModel) -> Ministral3ForCausalLM:
    fields = config_json(model.config)
    for name in ("model_type", "architectures", "mask_token_id", "block_size"):
        del fields[name]
    reference = Ministral3ForCausalLM(Ministral3Config(**fields, attn_implementation="eager")).eval()
    renamed = {
        name.replace("encoder.", "model.").replace("diffusion_head", "lm_head"): tensor
        for name, tensor in model.published_state().items()
    }
    reference.load_state_dict(renamed)
    return reference


@torch.no_grad()
def test_equals_transformers_ministral3():
    torch.manual_seed(0)
    model = TriModel(CONFIG)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 101))
    causal = torch.ones(2, 101, 101, dtype=torch.bool).tril()
    ours = model.logits(model(ids, torch.arange(101).expand(2, -1), causal))
    theirs = ministral(model)(ids).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_heads_start_by_copying():
    """From the start, words of the context are likelier than other words."""
    torch.manual_seed(2)
    model = TriModel(ModelConfig(vocab_size=200))
    ids = torch.randint(0, 200, (8, 30))
    causal = torch.ones(8, 30, 30, dtype=torch.bool).tril()
    last = model.logits(model(ids, torch.arange(30).expand(8, -1), causal))[:, -1]
    seen = torch.zeros(8, 200, dtype=torch.bool).scatter_(1, ids[:, :-1], True)
    assert last[seen].mean() > last[~seen].mean() + 0.2


@torch.no_grad()
def test_noisy_half_equals_a_separate_forward():
    """A noisy block after the clean tokens before it gives what [prefix, block] gives alone."""
    torch.manual_seed(1)
    model = TriModel(CONFIG)
    clean, block, start = torch.randint(5, 97, (1, 20)), torch.tensor([[11, 3, 3, 13]]), 9
    causal = torch.ones(1, 20, 20, dtype=torch.bool).tril()
    seen = torch.zeros(1, 4, 24, dtype=torch.bool)
    seen[:, :, :start] = True
    seen[:, :, 20:] = True
    positions = torch.cat((torch.arange(20), torch.arange(start, start + 4)))[None]
    joint = model(torch.cat((clean, block), 1), positions, causal, seen)[:, 20:]
    alone_mask = torch.ones(1, 13, 13, dtype=torch.bool).tril()
    alone_mask[:, start:] = True
    alone = model(torch.cat((clean[:, :start], block), 1), torch.arange(13)[None], alone_mask)[:, start:]
    torch.testing.assert_close(joint, alone, rtol=1e-4, atol=1e-5)


def test_export_is_loadable(tmp_path):
    tokenizer = train_tokenizer(num_chats=300, vocab_size=600, seed=0)
    config = ModelConfig(tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_layers=2,
                         num_heads=4, num_kv_heads=2)  # fmt: skip
    model = TriModel(config)
    export(model, tokenizer, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == "nemotron_labs_diffusion"
    assert [fields[f"{name}_token_id"] for name in ("mask", "bos", "eos")] == [MASK_ID, BOS_ID, EOS_ID]
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert weights["encoder.embed_tokens.weight"].shape == (fields["vocab_size"], fields["hidden_size"])
    assert weights["diffusion_head.weight"].dtype == torch.float32
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.mask_token_id, loaded.eos_token_id) == (MASK_ID, EOS_ID)
    assert len(loaded) == fields["vocab_size"]
    assert loaded.encode("Hello")[0] == BOS_ID


@pytest.mark.parametrize("system", [False, True])
def test_chat_template_equals_the_training_encoding(tmp_path, system):
    tokenizer = train_tokenizer(num_chats=300, vocab_size=600, seed=0)
    config = ModelConfig(tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_layers=1,
                         num_heads=4, num_kv_heads=2)  # fmt: skip
    export(TriModel(config), tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "system", "content": "You are Triad."}] if system else []
    chat += [
        {"role": "user", "content": "Sort from a to z: lamp, apple"},
        {"role": "assistant", "content": "1. apple\n2. lamp"},
        {"role": "user", "content": " Ünïcode\n\n"},
        {"role": "assistant", "content": "ok"},
    ]
    rendered = loaded.apply_chat_template(chat, tokenize=False)
    assert loaded.encode(rendered, add_special_tokens=False) == encode_chat(tokenizer, Chat(chat)).ids
    asked = loaded.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(asked)


def test_a_checkpoint_is_taken_up_as_it_was_exported(tmp_path):
    tokenizer = train_tokenizer(num_chats=300, vocab_size=600, seed=0)
    config = ModelConfig(tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_layers=2,
                         num_heads=4, num_kv_heads=2)  # fmt: skip
    exported = TriModel(config)
    export(exported, tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    torch.manual_seed(1)
    model = TriModel(config)
    model.load_published(weights)
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert model.encoder.embed_tokens.weight is model.diffusion_head.weight
    weights["encoder.embed_tokens.weight"][3, 5] += 1
    with pytest.raises(ValueError, match="tied"):
        model.load_published(weights)
