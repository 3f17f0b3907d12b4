"""POST /v1/completions and /v1/chat/completions: bodies to engine requests, answers to replies.

body ──parse──▶ prompts (ids) ──run──▶ answers ──▶ one JSON document, or server-sent events
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

import cluster.messages as messages
from cluster.messages import Grammar
from deployments.access_log import record_of
from deployments.answers import Answers, Item, run, with_shared_prompts
from deployments.body import read_json
from deployments.body_fields import MAX_PROMPTS, parse
from deployments.chat_protocol import ChatRequest
from deployments.chat_reply import CallsWanted, ChatReply
from deployments.completion_reply import CompletionReply
from deployments.concurrency import until_disconnect
from deployments.errors import invalid
from deployments.prompts import Ids, Prompts, check_model
from deployments.protocol import CompletionRequest, GenerationRequest
from deployments.replies import Frame, Reply, Shown
from deployments.sampling import fitting, sampling_params
from deployments.serving import Service
from deployments.streaming import EventStream, gather, sent_events
from deployments.tasks import require
from deployments.tool_grammar import tool_grammar

MAX_ROUTED_TOKENS = 4096  # of one document


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a body comes to, whichever route it came by."""

    prompts: Sequence[Ids]
    source: str  # the field they were written in
    shown: Shown
    grammar: Grammar | None
    echo: bool = False
    continues_prompt: bool = False
    calls: bool = False  # may be in the answer, behind a special token that must be in its text then


class Generation:
    def __init__(self, service: Service, prompts: Prompts) -> None:
        self._service = service
        self._prompts = prompts

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/completions", self.completions, methods=["POST"])
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        return router

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionRequest, await read_json(request))
        self._check(body, len(body.prompt))
        prompts = await self._prompts.encode_all(body.prompt, body.add_special_tokens)
        shown = _shown(body, logprobs=body.logprobs is not None, echo=body.echo)
        wanted = Wanted(prompts, "prompt", shown, body.grammar, body.echo, continues_prompt=True)
        reply = CompletionReply(self._frame("cmpl", body), shown, self._prompts.tokenizer)
        return await self._answer(request, body, wanted, reply)

    async def chat(self, request: Request) -> Response:
        body = parse(ChatRequest, await read_json(request))
        self._check(body, 1)
        prompt = await self._prompts.of_chat(body.messages, body.callable_tools)
        shown = _shown(body, logprobs=body.logprobs)
        grammar, calls = body.grammar, None
        if body.callable_tools:
            calls = CallsWanted(body.must_call, None if body.parallel_tool_calls else 1, body.names_a_tool)
            grammar = await tool_grammar(body, self._service, self._prompts.marker_id())
            prompt += self._prompts.marker() if body.must_call else []
        wanted = Wanted([prompt], "messages", shown, grammar, calls=calls is not None)
        reply = ChatReply(self._frame("chatcmpl", body), shown, self._prompts.tokenizer, calls)
        return await self._answer(request, body, wanted, reply)

    async def _answer(self, request: Request, body: GenerationRequest, wanted: Wanted, reply: Reply) -> Response:
        service, record = self._service, record_of(request.scope)
        common = self._engine_request(body, wanted, reply.id, f"{record.key or ''}:{body.user}")
        requests = [self._with_prompt(common, body, wanted, index) for index in range(len(wanted.prompts))]
        _refuse_long_routing(body, requests)
        record.request_id = reply.id
        record.prompt_tokens = sum(len(each.prompt_ids) for each in requests)
        answers = run(service, requests)
        if body.n > 1 and requests[0].sampling.prompt_logprobs is not None:
            answers = with_shared_prompts(answers, body.n)
        choices = [reply.choice(index, requests[index // body.n].prompt_ids) for index in range(len(requests) * body.n)]
        if body.stream:
            first = await until_disconnect(request.receive, _first(answers))
            options = body.stream_options
            include_usage = options is not None and options.include_usage
            return EventStream(sent_events(reply, choices, record, first, answers, include_usage), answers)
        async with aclosing(answers):
            whole = await until_disconnect(request.receive, gather(reply, choices, record, answers))
        return JSONResponse(whole)

    def _engine_request(self, body: GenerationRequest, wanted: Wanted, identity: str, user: str) -> messages.Request:
        """What the requests of all prompts have in common."""
        sampling = sampling_params(
            body,
            self._prompts,
            wanted.grammar,
            longest=self._service.engine.max_model_len,
            show_special_tokens=wanted.calls or not body.skip_special_tokens,
        )
        return messages.Request(
            f"{identity}-{secrets.token_hex(4)}",  # a caller's request_id may come twice
            (),
            sampling,
            n=body.n,
            continues_prompt=wanted.continues_prompt,
            echo=wanted.echo,
            priority=body.priority,
            user=user,
            cache_salt=body.cache_salt,
            deadline_s=time.monotonic() + self._service.live.limits.request_timeout_s,
        )

    def _with_prompt(
        self, common: messages.Request, body: GenerationRequest, wanted: Wanted, index: int
    ) -> messages.Request:
        room = body.max_new_tokens or 1
        prompt = self._prompts.check(
            wanted.prompts[index], wanted.source, room=room, truncate=body.truncate_prompt_tokens
        )
        return replace(
            common,
            request_id=f"{common.request_id}-{index}",
            prompt_ids=tuple(prompt),
            sampling=fitting(common.sampling, self._service.engine.max_model_len - len(prompt)),
        )

    def _check(self, body: GenerationRequest, prompts: int) -> None:
        check_model(body.model, self._service.model_names)
        require(self._service.task, "generate")
        most = self._service.live.limits.max_n
        if body.n > most:
            raise invalid(f"n: at most {most} here, limits.max_n of this server, not {body.n}.", "n")
        if prompts * body.n > MAX_PROMPTS:
            raise invalid(f"n: {prompts} prompts with {body.n} answers each are more than {MAX_PROMPTS} choices.", "n")

    def _frame(self, kind: str, body: GenerationRequest) -> Frame:
        identity = f"{kind}-{body.request_id or secrets.token_hex(12)}"
        return Frame(identity, body.model, int(time.time()), self._service.fingerprint)


def _shown(body: GenerationRequest, *, logprobs: bool, echo: bool = False) -> Shown:
    return Shown(
        logprobs,
        prompt_logprobs=body.prompt_logprobs is not None,
        token_ids=body.return_token_ids,
        echo=echo,
        special_tokens=not body.skip_special_tokens,
        routing=body.return_routing,
    )


def _refuse_long_routing(body: GenerationRequest, requests: Sequence[messages.Request]) -> None:
    """Routing takes kilobytes a token: a stream hands them on, a document would have to hold them all."""
    tokens = sum(request.sampling.max_tokens * request.n for request in requests)
    if body.return_routing and not body.stream and tokens > MAX_ROUTED_TOKENS:
        raise invalid(
            f"return_routing: without stream at most {MAX_ROUTED_TOKENS} tokens are possible with it, and this request "
            f"may get {tokens}; set a smaller max_tokens, or stream: true.",
            "return_routing",
        )


async def _first(answers: Answers) -> Item:
    return await anext(answers)
