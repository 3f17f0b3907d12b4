"""Bodies of the routes that turn texts into numbers: embeddings, labels, and answers found in a text."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from deployments.body_fields import MAX_PROMPTS, Body, Neutral, Prompts

_NEUTRAL: Neutral = {"dimensions": ()}  # these vectors have the model's own length


class InputRequest(Body):
    model: str
    input: Prompts = Field(description=f"a text, token ids, or a list of up to {MAX_PROMPTS} of these")
    add_special_tokens: bool = Field(True, description="the tokenizer's own `<s>` before a text")
    truncate_prompt_tokens: int | None = Field(None, ge=1, le=1 << 31, description="only the last so many tokens")
    priority: int = Field(0, ge=-(1 << 31), lt=1 << 31, description="lower runs first")
    user: str = Field("", max_length=512)


class EmbeddingRequest(InputRequest):
    neutral: ClassVar[Neutral] = _NEUTRAL

    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["last", "mean"] = Field("last", description="extension; the last token's state or the mean of all")
    normalize: bool = Field(True, description="extension; vectors of length 1, as OpenAI's are")


class ClassifyRequest(InputRequest):
    pass


class QuestionRequest(Body):
    model: str
    question: str = Field(min_length=1)
    context: str = Field(min_length=1)
    max_answer_tokens: int = Field(15, ge=1, le=4096)
    priority: int = Field(0, ge=-(1 << 31), lt=1 << 31)
    user: str = Field("", max_length=512)
