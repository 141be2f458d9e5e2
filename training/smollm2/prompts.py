"""Prompts for the base to answer, as token ids: `python -m training.smollm2.prompts`.

Most come from templates (topics.py), the rest are tasks on a passage: paragraphs of the docstrings and
READMEs of Python packages that are installed here. Prompts near a held-out one are left out. The file has the
splits "train" and "held_out"; beside it, sources.json says which package gave how many passages under which
licence.
"""

import argparse
import ast
import json
import random
import re
import sysconfig
import textwrap
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from platform import python_version

from tqdm import tqdm

from replicas.text import TextCodec
from training.smollm2 import topics
from training.smollm2.documents import Prompts

LICENCES = {
    "python": "PSF-2.0",
    "fastapi": "MIT",
    "httpx": "BSD-3-Clause",
    "hypothesis": "MPL-2.0",
    "networkx": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "openai": "Apache-2.0",
    "pydantic": "MIT",
    "pytest": "MIT",
    "ray": "Apache-2.0",
    "rich": "MIT",
    "starlette": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "torch": "BSD-3-Clause",
    "transformers": "Apache-2.0",
    "typer": "MIT",
}
"""The licence of each package that gives passages; "python" is the standard library."""

Message = dict[str, str]
_FILES_PER_PACKAGE = 150
_PASSAGES_PER_PACKAGE = 300
_SHINGLE = 6
"""The length in words of a run that a training prompt may not share with a held-out one."""


def held_out_prompts() -> list[str]:
    """Chat prompts that no training prompt resembles, one a line of held_out.txt."""
    return (Path(__file__).parent / "held_out.txt").read_text().splitlines()


def passages(package: str, rng: random.Random) -> list[str]:
    """Paragraphs of plain English from a package's docstrings and README; none where it is not installed."""
    try:
        files, texts = _sources(package)
    except PackageNotFoundError:
        return []
    rng.shuffle(files)
    for file in files[:_FILES_PER_PACKAGE]:
        texts += _docstrings(file)
    found = {paragraph for text in texts for paragraph in _paragraphs(text)}
    kept = sorted(found)
    rng.shuffle(kept)
    return kept[:_PASSAGES_PER_PACKAGE]


def _sources(package: str) -> tuple[list[Path], list[str]]:
    """The package's source files in a fixed order, and its texts that are no source."""
    if package == "python":
        return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")), []
    installed = distribution(package)
    files = [Path(str(file.locate())) for file in installed.files or [] if file.suffix == ".py"]
    _, _, readme = (installed.read_text("METADATA") or "").partition("\n\n")
    return sorted(files), [readme]


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of 20 to 80 words, from a capital to a full stop, nearly all letters."""
    for block in re.split(r"\n\s*\n", textwrap.dedent(text)):
        paragraph = " ".join(block.split())
        letters = sum(char.isalpha() or char == " " for char in paragraph)
        plain = re.fullmatch(r"[A-Z][^<>{}|=\\#*]*\.", paragraph) is not None
        if plain and 20 <= len(paragraph.split()) <= 80 and letters > 0.92 * len(paragraph):
            yield paragraph


def _choices(text: str) -> list[str]:
    return [item.strip() for item in text.replace("\n", "").split("|")]


class Drawer:
    """Draws prompts from the templates and the passages; a pure function of the random numbers."""

    def __init__(self, texts: list[str]) -> None:
        self._passages = texts
        self._topics = _choices(topics.TOPICS)
        self._slots = {
            "hero": _choices(topics.HEROES),
            "place": _choices(topics.PLACES),
            "event": _choices(topics.EVENTS),
            "who": _choices(topics.PEOPLE),
            "matter": _choices(topics.MATTERS),
            "task": _choices(topics.CODE_TASKS),
            "name": _choices(topics.NAMES),
            "other": _choices(topics.NAMES),
            "thing": _choices(topics.THINGS),
        }
        self._small_talk = _choices(topics.SMALL_TALK)
        self._kinds: list[tuple[Callable[[random.Random], str], float]] = [
            (self._on_topic, 0.42),
            (lambda rng: self._fill(topics.STORIES, rng), 0.12),
            (lambda rng: self._fill(topics.LETTERS, rng), 0.06),
            (lambda rng: self._fill(topics.CODE, rng), 0.06),
            (self._sum, 0.08),
            (lambda rng: rng.choice(self._small_talk), 0.02),
        ]
        if texts:
            self._kinds.append((self._on_passage, 0.24))

    def draw(self, rng: random.Random) -> tuple[Message, ...]:
        """A chat that waits for its first answer; one in eight has a system prompt of its own."""
        (kind,) = rng.choices([k for k, _ in self._kinds], [share for _, share in self._kinds])
        prompt = kind(rng)
        user = {"role": "user", "content": prompt[0].upper() + prompt[1:] if rng.random() < 0.9 else prompt}
        if rng.random() < 0.125:
            return {"role": "system", "content": rng.choice(topics.SYSTEM_PROMPTS)}, user
        return (user,)

    def _on_topic(self, rng: random.Random) -> str:
        topic, other = rng.sample(self._topics, 2)
        forms = topics.ABOUT_TWO if rng.random() < 0.25 else topics.ABOUT_TOPIC
        return rng.choice(forms).format(t=topic, u=other)

    def _fill(self, forms: tuple[str, ...], rng: random.Random) -> str:
        slots = {name: rng.choice(items) for name, items in self._slots.items()}
        return rng.choice(forms).format(**slots)

    def _sum(self, rng: random.Random) -> str:
        slots = {name: rng.choice(items) for name, items in self._slots.items()}
        numbers = {"a": rng.randint(40, 500), "b": rng.randint(5, 39), "c": rng.randint(2, 12)}
        return rng.choice(topics.SUMS).format(**slots, **numbers)

    def _on_passage(self, rng: random.Random) -> str:
        return rng.choice(topics.ON_PASSAGE).format(p=rng.choice(self._passages))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def shingles(text: str) -> set[tuple[str, ...]]:
    """All runs of _SHINGLE words, or the whole of a shorter text."""
    words = _words(text)
    return {tuple(words[at : at + _SHINGLE]) for at in range(max(1, len(words) - _SHINGLE + 1))}


def train_chats(count: int, texts: list[str], seed: int) -> Iterator[tuple[Message, ...]]:
    """Draws different chats, none with a run of words that a held-out prompt has."""
    rng, drawer = random.Random(seed), Drawer(texts)
    kept_out = set().union(*map(shingles, held_out_prompts()))
    seen: set[tuple[str, ...]] = set()
    for _ in range(20 * count):
        chat = drawer.draw(rng)
        key = tuple(message["content"] for message in chat)
        if key not in seen and not shingles(chat[-1]["content"]) & kept_out:
            seen.add(key)
            yield chat
            if len(seen) == count:
                return
    raise ValueError(f"the templates give {len(seen)} different prompts, fewer than {count}; ask for fewer")


def encode(codec: TextCodec, chats: Iterable[tuple[Message, ...]], max_len: int) -> list[list[int]]:
    """Token ids of the chats through the chat template; those longer than max_len tokens are left out."""
    return [ids for chat in chats if len(ids := codec.encode(chat)) <= max_len]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", type=Path, required=True, help="the converted checkpoint, for its tokenizer"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60_000)
    parser.add_argument("--max-len", type=int, default=160, help="tokens of a prompt, its template included")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    codec = TextCodec.load(str(arguments.base))
    rng = random.Random(arguments.seed)
    by_package = {package: passages(package, rng) for package in LICENCES}
    texts = [text for found in by_package.values() for text in found]
    chats = tqdm(train_chats(arguments.count, texts, arguments.seed), total=arguments.count, mininterval=5)
    train = encode(codec, chats, arguments.max_len)
    held_out = encode(
        codec, [({"role": "user", "content": p},) for p in held_out_prompts()], arguments.max_len
    )
    assert len(held_out) == len(held_out_prompts())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    splits = {"train": train, "held_out": held_out}
    padded = {name: Prompts.of(prompts, 0, arguments.max_len) for name, prompts in splits.items()}
    Prompts.save(arguments.out, padded)
    sources = [
        {
            "package": package,
            "version": python_version() if package == "python" else version(package),
            "licence": LICENCES[package],
            "passages": len(found),
        }
        for package, found in by_package.items()
        if found
    ]
    arguments.out.with_name("sources.json").write_text(json.dumps(sources, indent=1) + "\n")
    print(
        f"{arguments.out}: {len(train)} prompts to train on, {len(held_out)} held out, {len(texts)} passages"
    )


if __name__ == "__main__":
    main()
