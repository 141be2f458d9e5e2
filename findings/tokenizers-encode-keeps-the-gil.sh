#!/usr/bin/env bash
# tokenizers 0.23.3: Tokenizer.encode keeps Python's GIL for as long as it takes, so every other thread stands
# still; encode_batch of one text gives it up, and so does encode_batch_fast. decode is like encode.
#
# Guessed before: encode gives the GIL up, as encode_batch is known to do; threads that tokenize leave an event
# loop alone. Seen (2 cores, Python 3.11): of 440,000 characters encode took 5.2 s, in which another thread's
# longest pause was 5.2 s; encode_batch took 2.5 s with a longest pause of 0.3 s.
# What follows for a server: call encode_batch_fast([text]) in a thread, not encode(text).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
import sys
import threading
import time

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
text = "a plain text of words " * 5000


def pause_of_others(call):
    """The longest pause of another thread while the call runs, as a share of the call's time."""
    took = []

    def work():
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)

    thread = threading.Thread(target=work)
    last, longest = time.perf_counter(), 0.0
    thread.start()
    while thread.is_alive():
        time.sleep(0.0005)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return min(1.0, longest / took[0])


def least(call):
    return min(pause_of_others(call) for _ in range(5))


ids = tokenizer.encode(text).ids
encode, decode = least(lambda: tokenizer.encode(text)), least(lambda: tokenizer.decode(ids))
batch = least(lambda: tokenizer.encode_batch([text]))
batch_fast = least(lambda: tokenizer.encode_batch_fast([text]))
print(f"tokenizers {tokenizers.__version__}, longest pause of another thread as a share of the call:")
print(f"encode {encode:.2f}, decode {decode:.2f}, encode_batch {batch:.2f}, encode_batch_fast {batch_fast:.2f}")
as_stated = min(encode, decode) > 0.9 and max(batch, batch_fast) < 0.5
sys.exit(0 if as_stated else "this has changed: see the head of the script")
PY
