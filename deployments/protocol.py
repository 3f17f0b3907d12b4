"""Bodies of the generation routes: the fields we honour, with their types and bounds, and those we only know.

docs/openai.md is the same list for people. Chat's own part is chat_protocol.py.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from cluster.messages import Grammar
from deployments.body_fields import MAX_PROMPTS, Body, Neutral, Prompts, Texts, TokenId
from deployments.structure import ResponseFormat, StructuredOutputs

MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_NAMED_TOKENS = 1 << 16

COMPLETION_NEUTRAL: Neutral = {"best_of": (1,), "suffix": ("",)}

# Fields about the caller's account with a hosted service: any value of their type is fine, there is nothing to do.
NOTHING_TO_DO = ("metadata", "prompt_cache_key", "safety_identifier")


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False

    @model_validator(mode="after")
    def _nothing_to_hide(self) -> StreamOptions:
        if self.include_obfuscation:
            raise ValueError("include_obfuscation: true is not possible in this version; leave it out or use false")
        return self


class GenerationRequest(Body):
    """What /v1/completions and /v1/chat/completions share."""

    model: str
    n: int = Field(1, ge=1, le=1024, description="answers to each prompt, up to `limits.max_n` of the server")
    stream: bool = False
    stream_options: StreamOptions | None = Field(None, description="`include_usage`; only with `stream`")
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0, description="extension; before these nothing ends an answer")
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=1 << 31, description="extension; 0 or -1: off")
    min_p: float = Field(0.0, ge=0, le=1, description="extension")
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="extension; of prompt and answer, 1: off")
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = Field(
        {}, max_length=MAX_BIASES, description=f"up to {MAX_BIASES} token ids to -100 to 100"
    )
    allowed_token_ids: list[TokenId] | None = Field(
        None, min_length=1, max_length=MAX_NAMED_TOKENS, description="extension; no others are sampled"
    )
    bad_words: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        [], max_length=MAX_BAD_WORDS, description="extension; texts that are not written, at the start of words too"
    )
    seed: int | None = Field(
        None, ge=-(1 << 63), lt=1 << 63, description="same seed, prompt and `system_fingerprint`: same answer"
    )
    stop: Texts = Field([], max_length=MAX_STOPS, description=f"a text or up to {MAX_STOPS} of them")
    stop_token_ids: list[TokenId] = Field([], max_length=64, description="extension")
    include_stop_str_in_output: bool = Field(False, description="extension")
    ignore_eos: bool = Field(False, description="extension")
    skip_special_tokens: bool = Field(True, description="extension; whether answers are without `[INST]` and its like")
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="extension; of each prompt token but the first; not with `stream`"
    )
    return_token_ids: bool = Field(False, description="extension; `token_ids` and `prompt_token_ids` in the answer")
    return_routing: bool = Field(False, description="extension; `routing` in the answer: the experts of each token")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=1 << 31, description="extension; only the last so many of the prompt; -1: as many as fit"
    )
    response_format: ResponseFormat = Field(
        ResponseFormat(type="text"), description="`text`, `json_object` or `json_schema`, which is always strict"
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="extension; one of `json`, `json_object`, `regex`, `choice`, `grammar` (Lark)"
    )
    priority: int = Field(0, ge=-(1 << 31), lt=1 << 31, description="extension; lower runs first")
    cache_salt: str = Field(
        "", max_length=256, description="extension; cached prefixes are shared only within one salt"
    )
    request_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._:-]{1,64}$", description="extension; becomes part of the answer's `id`"
    )
    user: str = Field("", max_length=512, description="under load users get equal shares")
    metadata: dict[str, str] = Field({})
    prompt_cache_key: str = ""
    safety_identifier: str = ""

    @property
    def max_new_tokens(self) -> int | None:
        """None: as many as fit."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens beside each sampled one; None: no log-probabilities at all."""
        return None

    @property
    def grammar(self) -> Grammar | None:
        if self.structured_outputs is not None:
            return self.structured_outputs.compiled()
        return self.response_format.grammar()

    @model_validator(mode="after")
    def _consistent(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only possible with stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is only possible without stream")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens: must be -1, or 1 or more, not 0")
        if self.structured_outputs is not None and self.response_format.type != "text":
            raise ValueError("give either response_format or structured_outputs")
        return self


class CompletionRequest(GenerationRequest):
    neutral: ClassVar[Neutral] = COMPLETION_NEUTRAL

    prompt: Prompts = Field(
        description=f"a text, token ids, or a list of up to {MAX_PROMPTS} of these: `n` choices each"
    )
    max_tokens: int | None = Field(16, ge=1, description="16 when not given")
    echo: bool = Field(False, description="the prompt before the answer, in `logprobs` too")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description=f"completions: a number up to {MAX_LOGPROBS}; chat: true or false"
    )
    add_special_tokens: bool = Field(True, description="extension; the tokenizer's own `<s>` before a text")

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]
