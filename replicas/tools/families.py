"""The formats by name, and the one that a chat template speaks."""

from collections.abc import Mapping

from replicas.model.config import CheckpointError
from replicas.tools.formats import Hermes, Llama3Json, Mistral, MistralList, ToolFormat
from replicas.tools.prompts import knows_tools
from replicas.tools.pythonic import Pythonic

FORMATS: Mapping[str, ToolFormat] = {
    each.name: each for each in (Hermes(), Mistral(), MistralList(), Llama3Json(), Pythonic())
}
_SIGNS = (
    ("[TOOL_CALLS]", "mistral"),
    ("<tool_call>", "hermes"),
    ("func_name1(", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary', "llama3_json"),
)


def format_of(template: str | None, wanted: str = "auto") -> ToolFormat | None:
    """The format of a model's calls.

    template: its chat template, by which "auto" goes, and which of Mistral's two formats it is; a model whose
    template shows none gets Hermes'. wanted: a format's name, "auto", or "none" for None. CheckpointError for
    another format than Hermes' where the template knows no tools, since the prompt asks for Hermes' then.
    """
    if wanted == "none":
        return None
    text = template or ""
    if not knows_tools(template):
        if wanted not in ("auto", "hermes"):
            raise CheckpointError(
                f"tool_parser={wanted}: the chat template knows no tools, so the prompt asks for calls in "
                "the form of hermes; leave tool_parser out"
            )
        return FORMATS["hermes"]
    if wanted == "auto":
        wanted = next((name for sign, name in _SIGNS if sign in text), "hermes")
    if wanted == "mistral" and "[TOOL_CALLS]" in text and "[ARGS]" not in text:
        wanted = "mistral_list"
    return FORMATS[wanted]
