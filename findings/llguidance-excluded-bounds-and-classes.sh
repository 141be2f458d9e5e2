#!/usr/bin/env bash
# llguidance 1.9.1: two kinds of JSON schemas whose grammars allow answers that the schemas do not.
#
# 1. A whole number that is excluded is allowed where the opposite bound has the same whole part: 0 under
#    exclusiveMinimum 0 and maximum 0.5. With maximum 2 it is refused, as it should be.
# 2. A class of characters that has all control characters has the quote and the backslash too, whatever it
#    says of them: ^[^"]$ allows a quote. ^[^a]$ refuses an a, as it should.
#
# Guessed before: bounds and classes are kept to, or the schema is refused. Seen: as above.
# What follows for a server: bounds moved inward, one control character taken out of such classes, or a check
# of the finished answer by a JSON-schema validator.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check llguidance==1.9.1 jsonschema==4.26.0
"$folder/venv/bin/python" - <<'PY'
import json
import sys

from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")


def allows(schema, answer):
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
    tokens = tokenizer.tokenize_str(answer)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def validates(schema, answer):
    return Draft202012Validator(schema).is_valid(json.loads(answer))


narrow = {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}
wide = {"type": "number", "exclusiveMinimum": 0, "maximum": 2}
no_quote = {"type": "string", "pattern": '^[^"]$'}
no_a = {"type": "string", "pattern": "^[^a]$"}
quote = json.dumps('"')
cases = [(narrow, "0"), (narrow, "0.25"), (wide, "0"), (no_quote, quote), (no_quote, '"a"'), (no_a, '"a"')]
seen = [(validates(*case), allows(*case)) for case in cases]
for (schema, answer), (valid, allowed) in zip(cases, seen, strict=True):
    print(f"{json.dumps(schema)}  {answer}: valid {valid}, allowed {allowed}")
stated = [(False, True), (True, True), (False, False), (False, True), (True, True), (False, False)]
sys.exit(0 if seen == stated else "this has changed: see the head of the script")
PY
