"""What every client asks for.

The model is small and was not trained to call tools: calls are forced, and what it makes of an offer is
looked at for its form alone.
"""

from typing import Any, Literal

from pydantic import BaseModel

MODEL = "triad-5m"
SORT = "Put these in ascending order: jacket, hammer, pencil, door, shovel, umbrella"
SORTED = "1. door\n2. hammer\n3. jacket\n4. pencil\n5. shovel\n6. umbrella"
"""The model's answer, in each of its modes."""
WEATHER = "How is the weather in Oslo?"
CALL_ID = "call_0123456789abcdef01234567"


class Wind(BaseModel):
    strength: Literal["calm", "breeze", "storm"]
    is_cold: bool


class Report(BaseModel):
    """A weather report."""

    sky: Literal["clear", "cloudy", "rain"]
    wind: Wind


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["unit", "days"],
    "additionalProperties": False,
}
"""Of the arguments of `get_weather`."""
FUNCTION = {"name": "get_weather", "description": "Get the weather.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}


def get_weather(unit: Literal["C", "F"], days: int) -> str:
    """Get the weather.

    Args:
        unit: C or F
        days: how many
    """
    return f"{days} days of rain at 7 {unit}"


def get_forecast(is_metric: bool) -> str:
    """Get the forecast.

    Args:
        is_metric: in C rather than F
    """
    return f"rain at 7 {'C' if is_metric else 'F'}"
