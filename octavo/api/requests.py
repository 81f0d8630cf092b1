"""What clients may ask for: the bodies of OpenAI's completions and chat completions.

A parameter that would change the result and is not here is refused, as is one that nobody knows; those that
change nothing are taken and forgotten.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

# What one request may ask for, at most.
MAX_BODY_BYTES = 4 << 20
MAX_CHOICES = 128
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_MESSAGES = 4096

# Bookkeeping of clients.
_WITHOUT_EFFECT = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
    }
)
# Values with which a parameter asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}

# What a prompt may be. These words are in the places of errors, where they are no names of parameters.
_TEXT, _TOKEN_IDS = KINDS_OF_PROMPTS = ("a text", "token ids")

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """Texts and lists of token ids, from any of the forms that OpenAI takes."""
    one = isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int)
    return [value] if one else value


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object in which null is the same as absent."""
    return {name: one for name, one in value.items() if one is not None}


def _kind(value: Any) -> str:
    return _TEXT if isinstance(value, str) else _TOKEN_IDS


def _refuse_others(value: Any) -> Any:
    """Say once, and not of each, that values are no token ids."""
    if isinstance(value, list) and not all(type(one) is int and one >= 0 for one in value):
        raise ValueError("expected texts, or token ids, which are whole numbers from 0")
    return value


TokenIds = Annotated[list[int], Field(min_length=1), BeforeValidator(_refuse_others)]
Prompt = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[TokenIds, Tag(_TOKEN_IDS)], Discriminator(_kind)
]
Prompts = Annotated[
    list[Prompt],
    Field(min_length=1, max_length=MAX_CHOICES),
    BeforeValidator(
        _as_prompts, json_schema_input_type=str | list[str] | TokenIds | list[TokenIds]
    ),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[
    list[StopString],
    Field(max_length=MAX_STOPS),
    BeforeValidator(_as_list, json_schema_input_type=StopString | list[StopString]),
]


class StreamOptions(BaseModel):
    """What a stream holds besides text."""

    model_config = _STRICT

    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of completion take. Sampling that is not given is the checkpoint's."""

    model_config = _STRICT

    model: str
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stops = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _forget(cls, body: Any) -> Any:
        """Leave out what asks for nothing."""
        if not isinstance(body, dict):
            return body
        return {
            name: value
            for name, value in _without_nulls(body).items()
            if name not in _WITHOUT_EFFECT and value not in _NEUTRAL.get(name, ())
        }

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to tell how many tokens there were."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Body):
    """``POST /v1/completions``."""

    prompt: Prompts
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False


class TextPart(BaseModel):
    """A part of a message."""

    model_config = _STRICT

    type: Literal["text"]
    text: str


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Parts = Annotated[
    list[TextPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart])
]


class Message(BaseModel):
    """What someone said."""

    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: Parts
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _forget(cls, message: Any) -> Any:
        """Leave out nulls: an answer that is sent back has many."""
        return _without_nulls(message) if isinstance(message, dict) else message

    def plain(self) -> dict[str, str]:
        """For a chat template, which knows nothing of parts or developers."""
        text = "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class ChatBody(Body):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
