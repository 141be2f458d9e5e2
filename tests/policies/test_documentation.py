"""docs/policies.md: its example runs, and its tables name every parameter with its default."""

import re
import sys
from pathlib import Path

import pytest

from policies.cost_model import CostModelParameters
from policies.hysteresis import StabiliseParameters
from policies.modes import DecodePlan, Mode
from policies.registry import POLICIES, create_policy
from policies.slo import SloParameters
from tests.policies.helpers import a_load, drive

TEXT = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()


def test_the_example_is_a_policy_by_its_dotted_name(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "night_shift.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "night_shift", raising=False)
    policy = create_policy("night_shift.NightShift", {"max_pages": 0.3})
    plans = [drive(policy, [(0.0, a_load(1, pages_used=pages))])[0][1].decode for pages in (10, 60)]
    assert plans == [DecodePlan(Mode.SELF_SPECULATION, 16), DecodePlan(Mode.AR)]


def test_every_policy_has_its_section():
    assert all(f"## `{name}`" in TEXT for name in POLICIES)


@pytest.mark.parametrize("model", [CostModelParameters, SloParameters, StabiliseParameters])
def test_tables_name_every_parameter_and_its_default(model):
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", TEXT, re.MULTILINE))
    for name, field in model.model_fields.items():
        default = field.default
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else f"{default}"
        shown = shown.removesuffix(".0") if rows[name].isdigit() else shown
        assert rows[name].strip("`") == shown, name
