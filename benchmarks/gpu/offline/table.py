"""The budget as a table in Markdown."""

from pathlib import Path
from typing import Any

from benchmarks.gpu.offline.devices import DEVICES

MARKS = ("<!-- compiled: begin -->", "<!-- compiled: end -->")
"""Between these the table is in a document."""

Budget = dict[str, dict[str, dict[str, Any]]]
"""By device and kernel (benchmarks.gpu.offline.compiled.budget_of)."""


def table(budget: Budget) -> str:
    """By kernel and device registers, spilled bytes, shared memory, residency, tensor cores."""
    devices = {name: device for name, device in DEVICES.items() if name in budget}
    labels = sorted({label for name in devices for label in budget[name]})
    lines = [
        "| kernel | " + " | ".join(f"{name} ({device.name})" for name, device in devices.items()) + " |",
        "|---" * (len(devices) + 1) + "|",
    ]
    for label in labels:
        cells = [_cell(budget[name].get(label)) for name in devices]
        lines.append(f"| `{label}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_table(document: Path, budget: Budget) -> None:
    """Replaces what the document has between the marks."""
    before, _, rest = document.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    document.write_text(f"{before}{MARKS[0]}\n{table(budget)}\n{MARKS[1]}{after}")


def _cell(most: dict[str, Any] | None) -> str:
    if most is None:
        return "-"
    parts = [f"{most['registers']} r"]
    if most["spilled_bytes"]:
        parts.append(f"{most['spilled_bytes']} B spilled")
    if shared := most["shared_bytes"]:
        parts.append(f"{shared / 1024:.0f} KiB" if shared >= 1024 else f"{shared} B")
    parts.append(f"x{most['num_resident']}")
    return ", ".join(parts + [most["tensor_cores"]] * bool(most["tensor_cores"]))
