"""A multiple-choice task for lm-evaluation-harness: `python -m tests.clients.choices` in a client's
environment, with a server's address, its model's name and the folder of its tokenizer.

Writes, as JSON, the accuracies and for each choice the token ids of context and continuation, the
log-likelihood, and whether the continuation is the likeliest.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from random import Random

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Austria": "Vienna",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "New Delhi",
    "Egypt": "Cairo",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Kenya": "Nairobi",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "light": "dark",
    "old": "new",
    "rich": "poor",
    "full": "empty",
    "hard": "soft",
    "high": "low",
    "wet": "dry",
    "long": "short",
    "strong": "weak",
    "early": "late",
    "open": "closed",
    "clean": "dirty",
    "near": "far",
    "true": "false",
    "happy": "sad",
    "deep": "shallow",
    "thick": "thin",
}


def questions() -> list[dict[str, object]]:
    """100 questions with four choices each."""
    rng = Random(0)
    found: list[dict[str, object]] = []
    asked = [
        ("Q: What is the capital of {}?\nA:", CAPITALS),
        ('Q: What is the opposite of "{}"?\nA:', OPPOSITES),
    ]
    for text, answers in asked:
        for subject, right in answers.items():
            wrong = rng.sample([other for other in answers.values() if other != right], 3)
            found.append(question(rng, text.format(subject), right, wrong))
    for _ in range(60):
        a, b = rng.randint(2, 49), rng.randint(2, 49)
        wrong = [str(a + b + step) for step in rng.sample([-11, -10, -2, -1, 1, 2, 10, 11], 3)]
        found.append(question(rng, f"Q: What is {a} + {b}?\nA:", str(a + b), wrong))
    return found


def question(rng: Random, text: str, right: str, wrong: list[str]) -> dict[str, object]:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"question": text, "choices": choices, "answer": choices.index(right)}


def main(url: str, model: str, tokenizer: str) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "questions.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in questions()))
        asking = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions", model=model, tokenizer=tokenizer, num_concurrent=2, batch_size=4
        )
        task = {
            "task": "choices",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        found = simple_evaluate(model=asking, tasks=[task], task_manager=TaskManager(), bootstrap_iters=0)
    rows = []
    for sample in found["samples"]["choices"]:
        for choice, (logprob, is_greedy) in zip(
            sample["doc"]["choices"], sample["filtered_resps"], strict=True
        ):
            context, continuation = asking._encode_pair(sample["doc"]["question"], f" {choice}")
            rows.append([context, continuation, logprob, bool(is_greedy)])
    results = found["results"]["choices"]
    accuracies = {name: results[f"{name},none"] for name in ("acc", "acc_norm")}
    json.dump({"accuracies": accuracies, "rows": rows}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
