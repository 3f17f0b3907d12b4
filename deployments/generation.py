"""POST /v1/completions, /v1/chat/completions, /tokenize, /detokenize: bodies to engine requests, answers to replies.

body ──parse──▶ prompts (ids) ──run──▶ answers ──▶ one JSON document, or server-sent events
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

import cluster.messages as messages
from cluster.messages import SamplingParams
from deployments.answers import Answers, Item, gather, run
from deployments.body import read_json
from deployments.errors import ApiError, invalid
from deployments.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    Message,
    TokenizeRequest,
    parse,
)
from deployments.replies import ChatReply, CompletionReply, Reply, usage
from deployments.serving import Engine
from deployments.settings import Limits
from deployments.streaming import EventStream, sent_events, until_disconnect
from model.errors import TokenizerError

Ids = Sequence[int]


class Generation:
    """The routes that need the engine's tokenizer, most of them the engine too."""

    def __init__(self, engine: Engine, model_names: Sequence[str], limits: Limits, keep_alive_s: float) -> None:
        self._engine = engine
        self._model_names = model_names
        self._limits = limits
        self._keep_alive_s = keep_alive_s

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/completions", self.completions, methods=["POST"])
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        router.add_api_route("/tokenize", self.tokenize, methods=["POST"])
        router.add_api_route("/detokenize", self.detokenize, methods=["POST"])
        return router

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionRequest, await read_json(request))
        check_model(body.model, self._model_names)
        prompts = [
            await self._encode(prompt, body.add_special_tokens) if isinstance(prompt, str) else prompt
            for prompt in body.prompt
        ]
        reply = CompletionReply(_identity("cmpl", body.request_id), body.model, int(time.time()))
        return await self._answer(request, body, prompts, reply, "prompt")

    async def chat(self, request: Request) -> Response:
        body = parse(ChatRequest, await read_json(request))
        check_model(body.model, self._model_names)
        prompt = await self._apply_template(body.messages, add_generation_prompt=True)
        reply = ChatReply(_identity("chatcmpl", body.request_id), body.model, int(time.time()))
        return await self._answer(request, body, [prompt], reply, "messages")

    async def tokenize(self, request: Request) -> Response:
        body = parse(TokenizeRequest, await read_json(request))
        check_model(body.model, self._model_names)
        if body.messages is not None:
            ids = await self._apply_template(body.messages, body.add_generation_prompt)
        else:
            ids = await self._encode(body.prompt or "", body.add_special_tokens)
        return JSONResponse({"count": len(ids), "max_model_len": self._engine.max_model_len, "tokens": list(ids)})

    async def detokenize(self, request: Request) -> Response:
        body = parse(DetokenizeRequest, await read_json(request))
        check_model(body.model, self._model_names)
        self._check_ids(body.tokens, "tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(self._engine.tokenizer.decode, body.tokens)})

    async def _answer(
        self, request: Request, body: GenerationRequest, prompts: Sequence[Ids], reply: Reply, source: str
    ) -> Response:
        requests = [
            messages.Request(
                f"{reply.id}-{secrets.token_hex(4)}-{index}",  # a caller's request_id may come twice
                tuple(prompt),
                self._sampling(body, prompt, source),
                continues_prompt=isinstance(body, CompletionRequest),
            )
            for index, prompt in enumerate(prompts)
        ]
        prompt_tokens = sum(map(len, prompts))
        answers = run(self._engine, requests, self._limits.request_timeout_s, self._keep_alive_s)
        if body.stream:
            first = await until_disconnect(request.receive, _first(answers))
            options = body.stream_options
            include_usage = options is not None and options.include_usage
            chunks = sent_events(reply, first, answers, prompt_tokens, len(requests), include_usage)
            return EventStream(chunks, answers)
        async with aclosing(answers):
            whole = await until_disconnect(request.receive, gather(answers, len(requests)))
        return JSONResponse(reply.whole(whole, usage(prompt_tokens, whole)))

    def _sampling(self, body: GenerationRequest, prompt: Ids, source: str) -> SamplingParams:
        self._check_ids(prompt, source)
        self._check_ids(body.stop_token_ids, "stop_token_ids")
        longest = self._engine.max_model_len
        if not prompt:
            raise invalid(f"{source}: the prompt has no tokens; send at least one.", source)
        if len(prompt) >= longest:
            raise invalid(
                f"{source}: the prompt has {len(prompt)} tokens and this server takes {longest}, "
                "at least one of them for the answer.",
                source,
                code="context_length_exceeded",
            )
        room = longest - len(prompt)
        return SamplingParams(
            max_tokens=room if body.max_new_tokens is None else min(room, body.max_new_tokens),
            temperature=body.temperature,
            top_k=max(0, body.top_k),
            top_p=body.top_p,
            min_p=body.min_p,
            seed=None if body.seed is None else body.seed % (1 << 63),  # samplers know no negative seeds
            stop=tuple(body.stop),
            stop_token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
        )

    async def _encode(self, text: str, add_special_tokens: bool) -> Ids:
        # Off the event loop: a body's worth of text takes long enough for every stream to notice.
        encode = self._engine.tokenizer.encode
        return await asyncio.to_thread(encode, text, add_special_tokens=add_special_tokens)

    async def _apply_template(self, conversation: Sequence[Message], add_generation_prompt: bool) -> Ids:
        turns = [{"role": message.role, "content": message.content} for message in conversation]
        apply = self._engine.tokenizer.chat_prompt
        try:
            return await asyncio.to_thread(apply, turns, add_generation_prompt=add_generation_prompt)
        except TokenizerError as error:
            raise invalid(f"messages: {error}", "messages") from None

    def _check_ids(self, ids: Ids, source: str) -> None:
        size = self._engine.tokenizer.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < size:
            raise invalid(f"{source}: token ids of this model are 0 to {size - 1}.", source)


def check_model(name: str | None, names: Sequence[str]) -> None:
    if name is not None and name not in names:
        possible = ", ".join(names)
        raise ApiError(
            404, f"There is no model {name[:80]!r} here; possible: {possible}.", param="model", code="model_not_found"
        )


async def _first(answers: Answers) -> Item:
    return await anext(answers)


def _identity(kind: str, request_id: str | None) -> str:
    return f"{kind}-{request_id or secrets.token_hex(12)}"
