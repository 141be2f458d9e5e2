"""At temperature 0 every lossless mode makes the same calls, whatever the choice of tools, one or several,
streamed or not: the embedded model, which a bias has call functions by itself."""

from pathlib import Path

import openai
import pytest

from policies.modes import DecodePlan, Mode
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from router.api import create_app
from tests.router.conftest import over_http
from tests.router.fakes import MODEL
from tests.router.stack import Stack, a_stack
from tests.router.test_tools import FOLDER, NAMED, TOOLS, streamed

TAG, EOS = 0, 2
ASKED = [{"role": "user", "content": "Put these in ascending order: jacket, hammer, pencil, door"}]
MODES = ("ar", "self_speculation", "auto")


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner.load(FOLDER, dtype="float32", num_pages=200, page_size=16)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """The embedded model's, in which a token that it has no use for opens a call."""
    folder = tmp_path_factory.mktemp("tagged")
    for file in (*Path(FOLDER).glob("*.json"), Path(FOLDER) / "chat_template.jinja"):
        (folder / file.name).write_text(file.read_text().replace("<|pad|>", "<tool_call>"))
    codec = TextCodec.load(str(folder))
    assert codec.chats.control_tags["<tool_call>"] == TAG
    return codec


async def made(client: openai.AsyncOpenAI, stack: Stack, **body) -> list[tuple]:
    """The text, the calls and the end of an answer: of each mode, whole and streamed."""
    stack.replicas[0].service.set_plan(DecodePlan(Mode.DIFFUSION, 8), "test")  # which `auto` may not follow
    answers = []
    for mode in MODES:
        asked = body | {"extra_body": {"decoding": {"mode": mode}}}
        (choice,) = (await client.chat.completions.create(**asked)).choices
        calls = [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or ()]
        answers.append((choice.message.content or "", calls, choice.finish_reason))
        (again,), _ = await streamed(client, **asked)
        answers.append((again["content"], again["calls"], again["end"]))
    return answers


@pytest.mark.parametrize("is_parallel", [True, False])
@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=["auto", "required", "named"])
async def test_every_lossless_mode_makes_the_same_calls(
    runner: TorchRunner, codec: TextCodec, choice: str | dict, is_parallel: bool
) -> None:
    async with a_stack([runner], codec=codec) as stack, over_http(create_app(stack.door)) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        (newline,) = codec.encode("\n")[-1:]
        first, *others = await made(
            client,
            stack,
            model=MODEL,
            messages=ASKED,
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=is_parallel,
            temperature=0,
            max_tokens=120,
            # A call behind a word or two, and another one behind it where it may come.
            logit_bias={str(TAG): 30, str(EOS): -20, str(newline): 5},
        )
        assert all(other == first for other in others)
        text, calls, _ = first
        assert bool(text) == (choice == "auto")
        assert len(calls) > 1 if is_parallel else len(calls) == 1
        await stack.settled()
