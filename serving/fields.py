"""What a client sent, read strictly: types, ranges, and no field that would be ignored.

    fields = Fields(read_body(data))
    n = fields.integer("n", 1, low=1, high=128)
    fields.refuse_rest({"best_of": (1,), "suffix": ()})     # what is left must be neutral

A field that is null is absent. What is wrong raises Refused, which routes.py puts into the shape of
the API that was asked.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import inputs

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class Refused(Exception):
    """A request that is not answered: an HTTP status, why in one line, the field and a word for
    programs."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def body(self) -> dict[str, Any]:
        """In the shape of OpenAI's API."""
        error = {"message": self.message, "type": KINDS.get(self.status, "server_error")}
        return {"error": error | {"param": self.param, "code": self.code}}


def read_body(data: bytes) -> dict[str, Any]:
    """The object that a body of JSON is."""
    try:
        return inputs.parse_object(data, "the body")
    except ValueError as error:
        raise Refused(str(error)) from None


class Fields:
    """The fields of an object, each asked for by name once; `within` names the object they lie in,
    for messages."""

    def __init__(self, values: dict[str, Any], within: str = ""):
        self.values = {name: value for name, value in values.items() if value is not None}
        self.within, self.known = within, set()

    def wrong(self, name: str, wanted: str) -> Refused:
        """That a field is not what it must be."""
        shown = repr(self.values[name])
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return Refused(f"{self.within}{name} must be {wanted}, not {shown}", self.within + name)

    def any(self, name: str, default: Any = None) -> Any:
        self.known.add(name)
        return self.values.get(name, default)

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        """A whole number, or `default`."""
        value = self.any(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.any(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.any(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A text or several; empty ones say nothing."""
        value = self.any(name, [])
        value = [value] if isinstance(value, str) else value
        right = isinstance(value, list) and all(isinstance(text, str) for text in value)
        if not right or len(value) > most:
            raise self.wrong(name, f"a text, or a list of {most} at most")
        return tuple(dict.fromkeys(text for text in value if text))

    def inner(self, name: str) -> "Fields":
        """The fields of an object in this one; none where it is absent."""
        value = self.any(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self.within}{name}.")

    def refuse_rest(self, neutral: Mapping[str, Sequence[Any]]) -> None:
        """Refused for a field that nobody asked for, unless it says what is so anyway: neutral,
        {name: values that change nothing}; none: any does."""
        for name, value in self.values.items():
            if name in self.known or (name in neutral and not neutral[name]):
                continue
            if name not in neutral:
                raise Refused(
                    f"{self.within}{name} is not known here", self.within + name, "unsupported"
                )
            same = (
                value == one and isinstance(value, bool) == isinstance(one, bool)
                for one in neutral[name]
            )
            if not any(same):
                raise Refused(
                    f"{self.within}{name} is not supported here: leave it out, or "
                    f"{' or '.join(map(repr, neutral[name]))}",
                    self.within + name,
                    "unsupported",
                )
