"""The formats by name, and the one that a chat template speaks."""

from collections.abc import Mapping

from replicas.tools.formats import Hermes, Llama3Json, Mistral, MistralList, ToolFormat
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
    template shows none gets Hermes'. wanted: a format's name, "auto", or "none" for None.
    """
    if wanted == "none":
        return None
    text = template or ""
    if wanted == "auto":
        wanted = next((name for sign, name in _SIGNS if sign in text), "hermes")
    if wanted == "mistral" and "[TOOL_CALLS]" in text and "[ARGS]" not in text:
        wanted = "mistral_list"
    return FORMATS[wanted]
