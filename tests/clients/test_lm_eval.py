"""lm-evaluation-harness by `local-completions` and `local-chat-completions`, with tasks of these tests."""

import json
import os
import subprocess
from pathlib import Path

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from tests.clients.asked import MODEL

ROOT = Path(__file__).parent.parent.parent
CHECKPOINT = ROOT / "replicas" / "checkpoints" / "triad-5m"
WORDS = (
    "jacket, hammer, pencil",
    "candle, flower, orange",
    "zipper, pillow, ladder",
    "door, shovel, umbrella",
    "pencil, door, candle",
)


def choices(words: str) -> list[str]:
    ordered = sorted(words.split(", "))
    return [", ".join(order) for order in (ordered, ordered[::-1], ordered[1:] + ordered[:1])]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "sorting.jsonl"
    rows = [
        {
            "question": f"Put these in ascending order: {words}",
            "choices": choices(words),
            "answer": "\n".join(
                f"{place}. {word}" for place, word in enumerate(sorted(words.split(", ")), 1)
            ),
        }
        for words in WORDS
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def task(data: Path, name: str, **more: object) -> dict[str, object]:
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    return {"task": name, **files, "test_split": "test", "doc_to_text": "{{question}}", **more}


def by_transformers(pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    command = [os.environ["TRIAD_PYTHON"], "-m", "tests.clients.forward"]
    told = subprocess.run(
        command, input=json.dumps(pairs), capture_output=True, text=True, check=True, cwd=ROOT
    )
    return [(logprob, is_greedy) for logprob, is_greedy in json.loads(told.stdout)]


def test_multiple_choice_is_that_of_transformers(base_url: str, data: Path) -> None:
    model = LocalCompletionsAPI(
        base_url=f"{base_url}/completions",
        model=MODEL,
        tokenizer=str(CHECKPOINT),
        num_concurrent=2,
        batch_size=4,
    )
    sorting = task(
        data,
        "sorting_choice",
        output_type="multiple_choice",
        doc_to_choice="choices",
        doc_to_target=0,
        metric_list=[{"metric": "acc"}],
    )
    found = simple_evaluate(model=model, tasks=[sorting], task_manager=TaskManager(), bootstrap_iters=0)
    samples = found["samples"]["sorting_choice"]
    told = [tuple(answer) for sample in samples for answer in sample["filtered_resps"]]
    texts = [
        (f"{sample['doc']['question']}", f" {choice}")
        for sample in samples
        for choice in sample["doc"]["choices"]
    ]
    expected = by_transformers([model._encode_pair(*pair) for pair in texts])
    assert len(told) == len(WORDS) * 3
    assert [logprob for logprob, _ in told] == pytest.approx([logprob for logprob, _ in expected], abs=5e-2)
    assert [bool(is_greedy) for _, is_greedy in told] == [is_greedy for _, is_greedy in expected]
    best = [max(range(3), key=lambda i: expected[3 * row + i][0]) for row in range(len(WORDS))]
    assert found["results"]["sorting_choice"]["acc,none"] == pytest.approx(best.count(0) / len(WORDS))


def test_generated_answers(base_url: str, data: Path) -> None:
    sorting = task(
        data,
        "sorting",
        output_type="generate_until",
        doc_to_target="answer",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 40, "temperature": 0.0},
        metric_list=[{"metric": "exact_match"}],
    )
    found = simple_evaluate(
        model="local-chat-completions",
        model_args={"base_url": f"{base_url}/chat/completions", "model": MODEL},
        tasks=[sorting],
        task_manager=TaskManager(),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert found["results"]["sorting"]["exact_match,none"] > 0.5
