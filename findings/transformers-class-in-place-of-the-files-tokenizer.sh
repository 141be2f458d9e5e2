#!/usr/bin/env bash
# transformers 5.24.0 with tokenizers 0.23.3: AutoTokenizer takes the words and merges of tokenizer.json, but the
# normalizer and the splits of the class that tokenizer_config.json names. So the same tokenizer.json gives other
# ids than tokenizers' own Tokenizer.from_file, without a warning, and save_pretrained writes them for good.
#
# Guessed before: tokenizer.json says all of how text becomes ids; the class is a name, as it was for the fast
# tokenizers of transformers 4. Seen, for a file that splits numbers by three digits and normalizes by NFKC:
#   PreTrainedTokenizerFast                              the file's ids
#   the same, beside a config.json of model_type qwen2   the ids of Qwen2Tokenizer
#   GPT2Tokenizer                                        byte-level splits of its own, and no normalizer
#   Qwen2Tokenizer                                       its own splits (single digits) and NFC; saved too
# decode gives back the text in each case, so nothing but the ids tells of it.
# What follows for a server: a model is asked with ids that it was not trained on. Hold the loaded tokenizer's
# normalizer and pre_tokenizer against the file's, or load by PreTrainedTokenizerFast.from_pretrained, which takes
# the file as it is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END = "<|endoftext|>"
alphabet = pre_tokenizers.ByteLevel.alphabet()
split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
file = Tokenizer(models.BPE())
file.normalizer = normalizers.NFKC()
file.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
file.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
)
file.train_from_iterator(["in 2024 and 2025 there were 12345 of 67890, says figure 1\n"] * 20, trainer)


def write(name, tokenizer_class, model_type=None):
    place = Path(sys.argv[1]) / name
    place.mkdir()
    file.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": tokenizer_class, "eos_token": END})
    )
    if model_type:
        (place / "config.json").write_text(json.dumps({"model_type": model_type}))
    return place


def agrees(loaded):
    """Of a text with numbers and of one that NFKC changes."""
    texts = ["in 2024 there were 12345", "ﬁgure ①"]
    return tuple(loaded.encode(text, add_special_tokens=False) == file.encode(text).ids for text in texts)


qwen = write("qwen", "Qwen2Tokenizer")
loaded = AutoTokenizer.from_pretrained(qwen)
loaded.save_pretrained(Path(sys.argv[1]) / "saved")
text = "in 2024 there were 12345"
ids = file.encode(text).ids, loaded.encode(text)
print(f"{text!r} is {len(ids[0])} ids by the file, {len(ids[1])} by Qwen2Tokenizer")
seen = {
    "PreTrainedTokenizerFast": agrees(AutoTokenizer.from_pretrained(write("fast", "PreTrainedTokenizerFast"))),
    "the same, qwen2": agrees(AutoTokenizer.from_pretrained(write("typed", "PreTrainedTokenizerFast", "qwen2"))),
    "GPT2Tokenizer": agrees(AutoTokenizer.from_pretrained(write("gpt2", "GPT2Tokenizer"))),
    "Qwen2Tokenizer": agrees(loaded),
    "saved by it": agrees(PreTrainedTokenizerFast.from_pretrained(Path(sys.argv[1]) / "saved")),
    "not by AutoTokenizer": agrees(PreTrainedTokenizerFast.from_pretrained(qwen)),
}
for name, (numbers, normalized) in seen.items():
    print(f"{name}: the file's ids of numbers {numbers}, of what NFKC changes {normalized}")
back = [loaded.decode(each) for each in ids]
stated = [(True, True), (False, False), (True, False), (False, False), (False, False), (True, True)]
as_stated = list(seen.values()) == stated and back == [text, text] and ids[0] != ids[1]
sys.exit(0 if as_stated else "this has changed: see the head of the script")
PY
