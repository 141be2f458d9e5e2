"""`python -m cluster.settings_table > docs/settings.md` writes the page of all keys of ClusterConfig."""

from typing import Any

from pydantic.fields import FieldInfo

from cluster.config import ClusterConfig
from policies.config import SharedConfig
from replicas.config import ReplicaConfig
from router.config import IngressConfig

HEAD = """# Settings

The keys of `serve run cluster.app:deploy key=value ...`, of `args:` in a Serve file and of `serve:` in the
chart's values, which fills in `redis_url`, `api_keys_file` and `app` itself. The page is made by
`python -m cluster.settings_table`; [operate](operate.md) and [policies](policies.md) say more.
"""

SECTIONS = (
    ("Model, policy and places", SharedConfig),
    ("Replicas", ReplicaConfig),
    ("Ingresses", IngressConfig),
    ("Deployment", ClusterConfig),
)
"""Each key is in the first section whose record has it."""


def settings_page() -> str:
    """The page, as Markdown."""
    parts, told = [HEAD], set[str]()
    for title, record in SECTIONS:
        fields = {key: field for key, field in record.model_fields.items() if key not in told}
        told |= fields.keys()
        rows = [f"| `{key}` | {_default(field)} | {field.description} |" for key, field in fields.items()]
        parts.append("\n".join([f"## {title}\n", "| key | default | |", "|---|---|---|", *rows, ""]))
    return "\n".join(parts)


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value in ((), {}):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(settings_page(), end="")
