"""What weights in 8 bits cost in quality, simulated on a CPU: `python -m benchmarks.weights_in_8_bits`.

The matrices of linear layers, the head's among them, are rounded to int8 or float8_e4m3fn with a scale for
each output and back, as `quantization` holds them on a GPU (replicas.kernels.normed_product). The ordinary
forward in float32 then computes with them, and with the weights as they were: so this is the rounding of
weights alone, without that of bfloat16 activations. Of a checkpoint of the embedded one's kind answers to
held-out tasks, by family; with `--text` the perplexity of files, in windows of 1,024 tokens, the mean
Kullback-Leibler divergence from the weights as they were, and the share of positions with the same most
probable token.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from math import exp
from pathlib import Path

import torch
from tokenizers import Tokenizer

from policies.modes import DecodePlan, Mode
from replicas.engine.batch import Segment
from replicas.kernels.normed_product import CODES, decoded, encoded
from replicas.messages import SamplingParams
from replicas.model.checkpoint import ModelWeights, load_weights, weights_to
from replicas.model.config import ModelConfig
from replicas.model.runner import TorchModel, TorchRunner
from replicas.text import TextCodec
from training.evaluate import DEFAULT_CHECKPOINT, Score, evaluate_runner

_PLANS = (DecodePlan(Mode.AR), *(DecodePlan(Mode.SELF_SPECULATION, block) for block in (4, 8, 16, 32)))
_WINDOW = 1024
_PAGE_SIZE = 16
_NUM_PAGES = 4096


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--per-family", type=int, default=20, help="held-out tasks of each family")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--text", type=Path, nargs="+", help="measure the perplexity of these files instead")
    parser.add_argument("--windows", type=int, default=12, help="of each kind of weights, at most")
    parser.add_argument("--codes", choices=list(CODES), default="int8")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.text:
        _print_perplexity(options.checkpoint, options.text, options.windows, options.codes)
    else:
        _print_answers(options.checkpoint, options.per_family, options.threads, options.codes)


def weights_of(folder: Path, config: ModelConfig, codes: str | None) -> ModelWeights:
    """The weights in float32, those of linear layers rounded to codes and back; None leaves them."""
    weights = load_weights(folder, config, torch.float32)
    if codes is None:
        return weights
    coded = weights_to(weights, torch.device("cpu"), partial(encoded, dtype=CODES[codes]))
    for layer in coded.layers:
        for name, scales in layer.scales.items():
            setattr(layer, name, decoded(getattr(layer, name), scales))
        layer.scales.clear()
    return ModelWeights(coded.embedding, coded.layers, coded.norm, decoded(coded.head, coded.head_scales))


def _print_answers(folder: Path, per_family: int, num_threads: int, codes: str) -> None:
    config = ModelConfig.from_folder(folder)
    codec = TextCodec.load(str(folder))
    found: dict[str | None, list[Score]] = {}
    for rounding in (None, codes):
        runner = TorchRunner(
            config,
            weights_of(folder, config, rounding),
            num_pages=_NUM_PAGES,
            page_size=_PAGE_SIZE,
            max_context=config.max_position_embeddings,
            native_threads=num_threads,
        )
        found[rounding], _ = evaluate_runner(runner, codec, per_family, _PLANS)
    print(f"| setting | family | tasks | exact %, as is | {codes} | tokens a round, as is | {codes} |")
    print("|---|---|---|---|---|---|---|")
    for before, after in zip(found[None], found[codes], strict=True):
        if before.setting == "ar" or before.family == "all":
            print(
                f"| {before.setting} | {before.family} | {before.num_tasks} | {100 * before.exact:.1f} "
                f"| {100 * after.exact:.1f} | {before.accepted:.2f} | {after.accepted:.2f} |"
            )
    same = all(score.same_as_ar == 1 for score in found[codes])
    print(f"\nself_speculation equals ar token for token with {codes} weights: {'yes' if same else 'NO'}")


def _print_perplexity(folder: Path, texts: list[Path], num_windows: int, codes: str) -> None:
    text = "\n".join(path.read_text() for path in texts)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    windows = [ids[at : at + _WINDOW] for at in range(0, len(ids) - _WINDOW + 1, _WINDOW)][:num_windows]
    config = ModelConfig.from_folder(folder)
    losses = [0.0, 0.0]
    divergence, num_same, num_tokens = 0.0, 0, 0
    both = zip(*(_log_probs(folder, config, windows, rounding) for rounding in (None, codes)), strict=True)
    for window, (before, after) in zip(windows, both, strict=True):
        following = torch.tensor(window[1:])[:, None]
        for number, rows in enumerate((before, after)):
            losses[number] -= float(rows[:-1].gather(1, following).sum())
        num_tokens += len(following)
        divergence += float((before.exp() * (before - after))[:-1].sum())
        num_same += int((before.argmax(-1) == after.argmax(-1))[:-1].sum())
    as_they_are, rounded = (exp(loss / num_tokens) for loss in losses)
    print(
        f"{num_tokens} tokens foretold: perplexity {as_they_are:.3f} as they are, {rounded:.3f} in "
        f"{codes}; KL {divergence / num_tokens:.4f}; the same most probable token at "
        f"{num_same / num_tokens:.1%}"
    )


def _log_probs(
    folder: Path, config: ModelConfig, windows: list[list[int]], codes: str | None
) -> Iterator[torch.Tensor]:
    """Each window's log-probabilities, [tokens, vocab] float32."""
    weights = weights_of(folder, config, codes)
    num_pages = _WINDOW // _PAGE_SIZE
    model = TorchModel(config, weights, num_pages, _PAGE_SIZE, _WINDOW)
    for window in windows:
        rows, pages = tuple(range(len(window))), tuple(range(num_pages))
        whole = Segment(0, 0, tuple(window), pages, len(window), False, rows, SamplingParams())
        with torch.inference_mode():
            _, logits = model.forward([whole])
            yield logits.float().log_softmax(-1)


if __name__ == "__main__":
    main()
