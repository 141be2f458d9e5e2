"""Makes a policy from its name and parameters, as a configuration has them."""

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from policies.cost_model import CostModelPolicy
from policies.fixed import FixedPolicy
from policies.hysteresis import StabiliseParameters, WithHysteresis
from policies.modes import Mode
from policies.policy import Policy, PolicyParameters
from policies.slo import SloPolicy
from policies.threshold import ThresholdPolicy

POLICIES: Mapping[str, type[Policy[Any]]] = {
    cls.name: cls for cls in (CostModelPolicy, SloPolicy, ThresholdPolicy, FixedPolicy)
}
DEFAULT_POLICY = CostModelPolicy.name

_STABILISE = "stabilise"

Model = TypeVar("Model", bound=PolicyParameters)


class PolicyError(ValueError):
    """Raised for a policy that does not exist or has wrong parameters; the message lists the choices."""


def policy_names() -> tuple[str, ...]:
    """Returns the names that `create_policy` knows. A mode's name means `fixed` to that mode."""
    return (*POLICIES, *(mode.value for mode in Mode))


def create_policy(name: str, parameters: Mapping[str, Any] | None = None) -> Policy[Any]:
    """Builds a policy, stabilised unless it is `fixed`.

    name: one of policy_names(), or the dotted name of an importable subclass of Policy.
    parameters: those of the policy, and under "stabilise" those of StabiliseParameters.
    Raises PolicyError.
    """
    given = dict(parameters or {})
    if name in tuple(Mode):
        if given.setdefault("mode", name) != name:
            raise PolicyError(f"policy {name}: mode is {given['mode']!r}; leave it out, or take policy fixed")
        name = FixedPolicy.name
    cls = POLICIES.get(name) or _import(name)
    if cls is FixedPolicy:
        return cls(_validated(cls.Parameters, given, name))
    bounds = _validated(StabiliseParameters, given.pop(_STABILISE, {}), f"{name}: {_STABILISE}")
    inner = cls(_validated(cls.Parameters, given, name, extra_key=_STABILISE))
    return WithHysteresis(inner, bounds)


def _import(name: str) -> type[Policy[Any]]:
    module_name, _, class_name = name.rpartition(".")
    choices = f"choose one of {', '.join(policy_names())}, or the dotted name of a Policy class"
    if not module_name:
        raise PolicyError(f"unknown policy {name!r}: {choices}")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PolicyError(f"policy {name!r} can't be imported ({error}): {choices}") from error
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise PolicyError(f"{name!r} is not a subclass of policies.policy.Policy")
    return found


def _validated(model: type[Model], given: Any, where: str, extra_key: str | None = None) -> Model:
    try:
        return model.model_validate(given)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'parameters'}: {problem['msg']}"
            for problem in error.errors()
        )
        keys = [*model.model_fields, *([extra_key] if extra_key else [])]
        raise PolicyError(f"policy {where}: {problems} (keys: {', '.join(keys)})") from error
