"""What the JSON body of a request says, checked: types, sampling options, messages; the same for every protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tq.engine.run.sampling import GenerateOptions
from tq.errors import TQError, UsageError

NO_LIMIT = 2**31 - 1  # as max_tokens: as many as the context has room for
MOST_STOPS = 64  # each is looked for after every token, while other answers wait
KINDS = {"image": "images", "image_url": "images", "input_image": "images", "input_audio": "sound", "audio": "sound"}


class RequestError(TQError):
    """A request that is answered with an error.

    Args:
        status: Of HTTP.
        code: A word for programs, such as "model_not_found".
        param: The field of the body that is to blame.
        retry_seconds: When to try again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_seconds: int | None = None,
        hint: str | None = None,
    ):
        super().__init__(message, hint)
        self.status, self.code, self.param, self.retry_seconds = status, code, param, retry_seconds


class Body(BaseModel):
    """A JSON object of a request. Fields that nobody reads are kept in `model_extra`."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Raises RequestError: a field is missing or has another type."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            param = ".".join(str(part) for part in first["loc"])
            if first["type"] == "missing":
                raise RequestError(f"{param} is missing", param=param) from error
            problem = first["msg"].removeprefix("Value error, ")
            raise RequestError(f"{param}: {problem[0].lower()}{problem[1:]}", param=param) from error

    def unread(self) -> tuple[str, ...]:
        """Fields that have a value and mean nothing here."""
        return tuple(name for name, value in (self.model_extra or {}).items() if value is not None)


def refuse_unless_neutral(document: Mapping[str, Any], neutral: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    """Refuse fields that would change the answer and are not there.

    Args:
        neutral: For each field the values that change nothing, and why others are refused. None changes nothing.

    Raises:
        RequestError: A field has another value.
    """
    for name, (values, why) in neutral.items():
        value = document.get(name)
        if value is not None and not any(value == other for other in values):
            raise RequestError(f"{name} is not supported here: {why}", param=name, code="unsupported_parameter")


def generate_options(
    defaults: GenerateOptions, given: Mapping[str, Any], names: Mapping[str, str], stop: str | Iterable[str] | None
) -> GenerateOptions:
    """The server's options with those of a request.

    Args:
        given: Values by the protocol's names; None is not given.
        names: The protocol's name of each option: its name here.

    Raises:
        RequestError: A value is out of its range.
    """
    chosen: dict[str, Any] = {}
    for name, option in names.items():
        value = _usual(option, given.get(name))
        if value is None:
            continue
        try:
            GenerateOptions(**{option: value})
        except UsageError as error:
            raise RequestError(error.message.replace(option, name, 1), param=name) from error
        chosen[option] = value
    if stop is not None:
        chosen["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        if len(chosen["stop"]) > MOST_STOPS:
            raise RequestError(f"there may be {MOST_STOPS} stop strings at most, not {len(chosen['stop'])}")
    try:
        return dataclasses.replace(defaults, **chosen)
    except UsageError as error:
        raise RequestError(error.message) from error


def _usual(option: str, value: Any) -> Any:
    """Other servers' spellings of "off", "random" and "no limit"."""
    if value is None:
        return None
    match option:
        case "seed" if value < 0:
            return None
        case "top_k" if value < 0:
            return 0
        case "repetition_penalty" if value == 0:
            return 1.0
        case "max_tokens" if value < 0:
            return NO_LIMIT
        case "repetition_context" if not 0 <= value < NO_LIMIT:
            return NO_LIMIT
    return value


def text_of(content: Any, param: str = "content") -> str:
    """The text of a message's content: a text, a list of text parts (a line each), or nothing.

    Raises:
        RequestError: A part is no text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{param} must be a text or a list of parts", param=param)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise not_text(kind, param)
        texts.append(part["text"])
    return "\n".join(texts)


def not_text(kind: Any, param: str) -> RequestError:
    """The refusal of a part that is no text."""
    if isinstance(kind, str) and kind in KINDS:
        return RequestError(f"{KINDS[kind]} are not supported here: the model reads text alone", param=param)
    return RequestError(f"{param} holds a part of type {kind!r}; text is all that is read here", param=param)


def call_of(identifier: str | None, name: Any, arguments: Any) -> dict[str, Any]:
    """An earlier function call, in OpenAI's words.

    Raises:
        RequestError: It has no name.
    """
    if not isinstance(name, str) or not name:
        raise RequestError("a function call in messages has no name", param="messages")
    call = {"type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}}
    return call if identifier is None else {"id": identifier, **call}


def calls_of(calls: Any) -> list[dict[str, Any]]:
    """`tool_calls` of an earlier message, in OpenAI's or Ollama's words.

    Raises:
        RequestError: They are no list of calls.
    """
    if not isinstance(calls, list) or not all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
    ):
        raise RequestError("tool_calls of a message must be a list of objects, each with a function", param="messages")
    functions = [(call.get("id"), call["function"]) for call in calls]
    return [call_of(identifier, given.get("name"), given.get("arguments")) for identifier, given in functions]


def function(name: str, description: str | None, parameters: Any) -> dict[str, Any]:
    """A function that the model may call, in OpenAI's words."""
    about = {"description": description} if description else {}
    schema = parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, **about, "parameters": schema}}


class Function(Body):
    """A function that the model may call."""

    name: str


class Tool(Body):
    """One of `tools`, in OpenAI's words."""

    type: str = "function"
    function: Function | None = None


def checked_tools(tools: list[dict[str, Any]] | None) -> tuple[dict[str, Any], ...]:
    """The functions that the model is told of.

    Raises:
        RequestError: One is no function, or has no name.
    """
    for tool in tools or ():
        read = Tool.read(tool)
        if read.type != "function" or read.function is None:
            raise RequestError(f"a tool of type {read.type!r} is not supported here: functions are", param="tools")
    return tuple(tools or ())


def goes_on(messages: list[dict[str, Any]]) -> bool:
    """Whether the last message is the beginning of an answer that the model is to go on with."""
    last = messages[-1] if messages else {}
    return last.get("role") == "assistant" and bool(last.get("content")) and not last.get("tool_calls")
