"""Says in keywords that llguidance knows what a JSON schema's `propertyNames` says.

It is how pydantic and zod write dictionaries whose keys are not just any string: keys of an enumeration
become declared properties, keys of a pattern or a length `patternProperties`, and no others may come. The
schema allows the objects that it did; a `propertyNames` of another kind stays.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

MAX_SPELLED = 2**18
"""Characters that the schemas of declared properties may come to."""
MAX_REFERENCES = 16
"""References from one to the next that are followed."""
_SAYS_NOTHING = frozenset(
    {"$schema", "$id", "$comment", "title", "description", "default", "examples", "type"}
)
_LENGTHS = frozenset({"minLength", "maxLength"})


def spell_names(schema: dict[str, Any], referred: Callable[[str], Any]) -> None:
    """Rewrites one schema in place, whose parts are rewritten already.

    referred: gives the value that a reference in it points to
    """
    names = schema.get("propertyNames", False)
    for _ in range(MAX_REFERENCES):
        if not isinstance(names, dict) or _said(names) != {"$ref"}:
            break
        names = referred(str(names["$ref"]))
    if names is True:
        names = {}
    if not isinstance(names, dict) or names.get("type", "string") != "string":
        return
    said = _said(names)
    if not said:
        del schema["propertyNames"]
    elif said == {"enum"} or said == {"const"}:
        _declare(schema, names["enum"] if "enum" in names else [names["const"]])
    elif said == {"pattern"}:
        _match(schema, names["pattern"])
    elif said <= _LENGTHS:  # without line ends, which hardly any name has
        least, most = names.get("minLength", 0), names.get("maxLength", "")
        _match(schema, f"^.{{{least},{most}}}$")


def _said(names: Mapping[str, Any]) -> set[str]:
    """The keywords that say something of a name."""
    return names.keys() - _SAYS_NOTHING


def _declare(schema: dict[str, Any], names: Any) -> None:
    """Declares the properties of these names alone, where nothing else speaks of some of them."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not (isinstance(names, list) and isinstance(properties, dict) and isinstance(required, list)):
        return
    listed = [name for name in dict.fromkeys(names) if isinstance(name, str)]
    if "patternProperties" in schema or not {*map(str, required), *properties} <= set(listed):
        return
    others = schema.get("additionalProperties", True)
    if len(listed) * len(json.dumps(others)) > MAX_SPELLED:
        return
    schema["properties"] = {name: properties.get(name, others) for name in listed}
    schema["additionalProperties"] = False
    del schema["propertyNames"]


def _match(schema: dict[str, Any], pattern: Any) -> None:
    """Allows properties whose names match alone, where none is declared."""
    if not isinstance(pattern, str) or {"properties", "patternProperties", "required"} & schema.keys():
        return
    schema["patternProperties"] = {pattern: schema.get("additionalProperties", True)}
    schema["additionalProperties"] = False
    del schema["propertyNames"]
