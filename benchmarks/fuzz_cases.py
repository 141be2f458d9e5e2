"""Bad and extreme requests: written by hand, by boundary values, and from the OpenAPI document."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from schemathesis.config import GenerationConfig

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Raw:
    """JSON text to be put into a body as it is: what json.dumps would not write."""

    text: str


@dataclass(frozen=True, slots=True)
class Case:
    """One request to send."""

    name: str
    path: str
    content: bytes
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    leave_after_s: float | None = None
    """The time from sending after which the client goes away; None if it stays."""


NUMBERS: tuple[Any, ...] = (
    *(
        0,
        -1,
        1,
        2,
        31,
        65,
        2**31 - 1,
        2**31,
        2**32,
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63) - 1,
        10**400,
    ),
    *(
        -0.0,
        5e-324,
        3e-38,
        1e-9,
        0.5,
        1.0,
        1.0000001,
        2.0,
        1e38,
        1.8e308,
        Raw("NaN"),
        Raw("-Infinity"),
        Raw("1e400"),
    ),
)
VALUES: tuple[Any, ...] = (
    *(*NUMBERS, *(str(value) for value in (0, 1, 2**63)), None, True, False, "", "x", "\0", Raw('"\\ud800"')),
    *([], {}, [[]], [None], {"a": [None]}, ["x"] * 17, "y" * 300),
)
SCHEMAS: tuple[Any, ...] = (
    {"const": 2**53 + 1},
    {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    {"type": "number", "maximum": Raw("1e999")},
    {"type": "string", "const": Raw('"\\udfff"')},
    {"enum": []},
    {"$ref": "#"},
    {"$ref": "#/definitions/none"},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"$ref": "http://127.0.0.1:9/schema"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "string", "pattern": "(a+)+b"},
    {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "(?=a)b"},
    {"type": "string", "maxLength": 2**40},
    {"type": "string", "minLength": 2**40},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2**40},
    {"type": "array", "items": {}, "minItems": 5000, "maxItems": 5000},
    {"type": "object", "minProperties": 10**6},
    {
        "type": "object",
        "properties": {f"p{k}": {"type": "string", "format": "date-time"} for k in range(400)},
    },
    {"anyOf": [{"type": "object", "properties": {f"a{k}": {"type": "integer"}}} for k in range(300)]},
    {"allOf": [{"anyOf": [{"const": f"{j}{k}"} for k in range(12)]} for j in range(12)]},
    {"not": {}},
    {"type": "nothing"},
    {"type": ["string"] * 50},
    {"multipleOf": 0, "type": "integer"},
    {"type": "integer", "multipleOf": Raw("1e-400")},
)
SPECIAL = (
    "<|mask|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<mask>",
    "<0xE4>",
    "\ufeff\u2581",
)


def encoded(value: Any) -> bytes:
    """JSON, with what Raw says written as it is; a lone surrogate is escaped."""
    return _text(value).encode(errors="surrogatepass")


def _text(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_text, value)) + "]"
    return json.dumps(value)


def chat(model: str, content: Any = "Write a short story about a fox.", /, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 6, **more}


def text(model: str, prompt: Any = "a fox", /, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": 6, **more}


def fields(document: dict[str, Any], path: str) -> list[str]:
    """The names of a body's fields, by the server's own document."""
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    named = (
        document["components"]["schemas"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    )
    return sorted(named["properties"])


def at_bounds(model: str, document: dict[str, Any]) -> list[Case]:
    """Cases of each field of each endpoint with each of NUMBERS. The same list each time."""
    found: list[Case] = []

    def add(name: str, body: Any, path: str = CHAT) -> None:
        found.append(Case(name, path, encoded(body)))

    for make, path in ((chat, CHAT), (text, TEXT)):
        for name in fields(document, path):
            for value in NUMBERS:
                add(f"{name}={_text(value)}", make(model, **{name: value}), path)
    for value in NUMBERS:
        for name in ("block_length", "threshold", "max_steps"):
            add(f"decoding.{name}={_text(value)}", chat(model, decoding={name: value}))
        add(f"logit_bias {_text(value)}", chat(model, logit_bias={"7": value}))
        add(f"logit_bias of {_text(value)}", chat(model, logit_bias={_text(value).strip('"'): 1}))
        add(f"prompt id {_text(value)}", text(model, [5, value]), TEXT)
    for k in range(200):
        add(f"threshold {k}", chat(model, max_tokens=2, decoding={"threshold": (k + 1) / 201}))
    return found


def kinds(model: str) -> list[Case]:
    """Cases of every kind that has hurt a server of this field once. The same list each time."""
    found: list[Case] = []

    def add(name: str, body: Any, path: str = CHAT, **more: Any) -> None:
        found.append(Case(name, path, body if isinstance(body, bytes) else encoded(body), **more))

    huge: tuple[dict[str, Any], ...] = (
        {"top_k": 2**63},
        {"seed": 2**63},
        {"repetition_penalty": 3e-38, "temperature": 1},
        {"logit_bias": {"7": 1e39}},
        {"temperature": 5e-324},
        {"min_tokens": 2**63},
        {"max_tokens": 2**63},
        {"timeout_s": 1e300},
        {"priority": 2**63},
        {"n": 2**63},
        {"logprobs": True, "top_logprobs": 2**63},
    )
    for value in huge:
        add(f"{value}", chat(model, **value))
    for k in range(20):
        add(f"threshold of its own {k}", chat(model, decoding={"threshold": (k + 1) / 21.5}))
    for penalty in (3e-38, 1e-45, 2.0):
        for temperature in (0, 1e-38, 1, 2):
            both = {"repetition_penalty": penalty, "temperature": temperature}
            add(f"{both}", chat(model, **both, presence_penalty=2, frequency_penalty=-2, logprobs=True))
    add("300 biases at their ends", chat(model, logit_bias={str(k): 100 - 200 * (k % 2) for k in range(300)}))
    add("all is forbidden", chat(model, logit_bias={str(k): -100 for k in range(300)}, min_tokens=6, top_k=1))
    for schema in SCHEMAS:
        for strict in (True, False):
            asked = {"name": "s", "schema": schema, "strict": strict}
            form = {"type": "json_schema", "json_schema": asked}
            add(f"schema {_text(schema)[:60]} {strict=}", chat(model, response_format=form))
    for special in SPECIAL:
        add(f"{special} in a text", chat(model, f"a {special} b {special}"))
        add(f"{special} in a prompt", text(model, special * 3), TEXT)
        add(f"stop {special}", chat(model, stop=[special], min_tokens=4))
    add("stops", chat(model, stop=["e", " ", "the", "a" * 256] * 4, n=2, logprobs=True, top_logprobs=20))
    add(
        "stops while blocks are decoded", chat(model, stop="a", max_tokens=64, decoding={"mode": "diffusion"})
    )
    for mode in ("ar", "diffusion", "self_speculation"):
        asked = {"mode": mode} | ({} if mode == "ar" else {"block_length": 64})
        add(f"{mode} beside a grammar", chat(model, decoding=asked, response_format={"type": "json_object"}))
    for k in range(4):
        add(f"a million characters {k}", chat(model, "é word\n" * 140_000))
        add(f"a million characters, one word {k}", text(model, "x" * 999_000), TEXT)
        add(f"a prompt that never fits {k}", text(model, [5] * 200_000), TEXT)
    add("many prompts", text(model, [[5, 6]] * 128, max_tokens=1), TEXT)
    add("many choices", chat(model, n=128, max_tokens=1))
    add(
        "many faulty messages",
        {"model": model, "messages": [{"role": k, "content": k} for k in range(50_000)]},
    )
    add("many good messages", {"model": model, "messages": [{"role": "user", "content": "a"}] * 50_000})
    add("many unknown fields", chat(model, **{f"f{k}": k for k in range(20_000)}))
    add("many parts", chat(model, [{"type": "text", "text": "a"}] * 20_000))
    for depth in (31, 33, 1000, 100_000):
        add(f"depth {depth}", b"[" * depth + b"]" * depth)
        add(f"depth of objects {depth}", b'{"a":' * depth + b"1" + b"}" * depth)
    whole = encoded(chat(model))
    for end in (0, 1, len(whole) // 2, len(whole) - 1):
        add(f"{end} bytes of it", whole[:end])
    add("a number of 100,000 digits", encoded(chat(model, seed=Raw("9" * 100_000))))
    add("a key twice", b'{"model": 1, ' + whole[1:])
    add("a BOM", b"\xef\xbb\xbf" + whole)
    add("no UTF-8", whole.replace(b"fox", b"\xff\xfe\xed\xa0\x80"))
    add(
        "UTF-16",
        whole.decode().encode("utf-16"),
        headers={"content-type": "application/json; charset=utf-16"},
    )
    add("said to be gzip", whole, headers=JSON | {"content-encoding": "gzip"})
    add("9 MB", encoded(chat(model, "a" * 9_000_000)))
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        add(f"content type {kind!r}", whole, headers={"content-type": kind})
    for name, told in (
        ("authorization", "Bearer " + "x" * 8000),
        ("traceparent", "00-" + "f" * 32 + "-" + "0" * 16 + "-ff"),
        ("tracestate", "a=b," * 2000),
        ("x-request-id", "a" * 5000),
    ):
        add(f"header {name}", whole, headers=JSON | {name: told})
    for path in ("/v1/models/", "/v1/models/%00", "/v1/nothing", "/v1/triad/state", "/metrics", "/healthz"):
        for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
            add(f"{method} {path}", b"{}", path, method=method)
    for stream in (True, False):
        for leave_after_s in (0.0, 0.02, 0.2):
            body = chat(model, max_tokens=500, stream=stream, ignore_eos=True, n=3)
            add(f"leaves after {leave_after_s} {stream=}", body, leave_after_s=leave_after_s)
    for timeout_s in (1e-9, 0.001, 0.05):
        add(f"timeout {timeout_s}", chat(model, max_tokens=500, ignore_eos=True, timeout_s=timeout_s))
    return found


def bounded(rng: random.Random) -> dict[str, Any]:
    """Fields of a body with some of their values at the ends of their ranges."""
    body: dict[str, Any] = {"stream": rng.random() < 0.5, "max_tokens": rng.choice((1, 2, 9))}
    for name, values in (
        ("temperature", (0, 1e-9, 1, 2)),
        ("top_p", (1e-9, 0.5, 1)),
        ("top_k", (0, 1, 10**6, 2**31 - 1, 2**63)),
        ("min_p", (0, 1)),
        ("seed", (-(2**63), 0, 2**63 - 1, 2**63)),
        ("presence_penalty", (-2, 2)),
        ("frequency_penalty", (-2, 2)),
        ("repetition_penalty", (1e-45, 3e-38, 0.1, 2)),
        ("min_tokens", (0, 5, 2**31)),
        ("logit_bias", ({}, {"0": 100}, {"5": -100, "6": 100}, {"999999999": 1})),
        ("priority", (-1000, 1000)),
        ("n", (1, 2, 5)),
        ("stop", ("a", ["\n", "<|mask|>"], [" "] * 16)),
        ("decoding", tuple({"mode": mode} for mode in ("auto", "ar", "diffusion", "self_speculation"))),
        ("response_format", ({"type": "json_object"}, {"type": "text"})),
        ("ignore_eos", (True,)),
        ("timeout_s", (0.01, 3600)),
    ):
        if rng.random() < 0.25:
            body[name] = rng.choice(values)
    return body


def mutations(model: str, document: dict[str, Any], seed: int) -> Iterator[Case]:
    """Cases of bodies at their ranges' ends, of which a field or some bytes are then anything. Without
    end."""
    rng = random.Random(seed)
    for number in count():
        make, path = rng.choice(((chat, CHAT), (text, TEXT)))
        body = make(model, **bounded(rng))
        for _ in range(rng.choice((0, 1, 1, 2))):
            body[rng.choice(fields(document, path))] = rng.choice(VALUES)
        body["model"] = model if rng.random() < 0.95 else body["model"]
        content = bytearray(encoded(body))
        for _ in range(rng.choice((0, 0, 0, 1, 3))):
            at = rng.randrange(len(content) + 1)
            content[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        yield Case(f"mutation {seed}/{number}", path, bytes(content))


def of_document(model: str, document: dict[str, Any], seed: int, num_cases: int) -> list[Case]:
    """Cases of Schemathesis: boundary values of each field, right and wrong ones, and bodies drawn at random.

    At most num_cases, a half of each where there are so many. Takes seconds of CPU, most of them once.
    """
    schema = schemathesis.openapi.from_dict(document)
    operations = [_valid(result) for result in schema.get_all_operations()]
    rng = random.Random(seed)
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    config = GenerationConfig()
    at_ends = [
        case
        for operation in operations
        if operation.path in (CHAT, TEXT)
        for case in schema.iter_coverage_cases(operation, generation_modes=modes, generation_config=config)
    ]
    drawn: list[Any] = []
    for operation in operations:
        num_examples = num_cases // 4 if operation.path in (CHAT, TEXT) else 4

        @seeded(seed)
        @settings(
            max_examples=max(1, num_examples),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes)))
        def keep(case: Any) -> None:
            drawn.append(case)

        keep()
    chosen = [rng.sample(cases, min(len(cases), num_cases // 2)) for cases in (at_ends, drawn)]
    made = (_case_of(case, model, number) for number, case in enumerate([*chosen[0], *chosen[1]]))
    return [case for case in made if case is not None]


def _valid(result: Any) -> Any:
    """The value of a result; a document that Schemathesis can't read is an error of the server's."""
    return result.ok()


def _case_of(case: Any, model: str, number: int) -> Case | None:
    """Makes Schemathesis's case one of ours; None if no client can send it, or it would change the policy."""
    sent = case.as_transport_kwargs(base_url="http://a")
    method, url = str(sent["method"]).upper(), str(sent["url"]).removeprefix("http://a")
    if not url.startswith("/") or (url.startswith("/v1/triad/policy") and method != "GET"):
        return None
    body = sent.get("json")
    if isinstance(body, dict) and body.get("model"):
        # Few tokens, or a body that is right keeps a server busy for minutes.
        body = {"max_tokens": 4} | body | {"model": model}
        body |= {"n": min(body["n"], 4)} if isinstance(body.get("n"), int) and body["n"] <= 128 else {}
    data = encoded(body) if "json" in sent else sent.get("data") or b""
    if not isinstance(data, bytes | str):
        return None
    headers = {str(name): str(value) for name, value in (sent.get("headers") or {}).items()}
    content = data if isinstance(data, bytes) else data.encode(errors="surrogatepass")
    return Case(f"{method} {url[:60]} {number}", url, content, method, JSON | headers)
