"""POST /v1/embeddings, /classify, /token_classify, /question_answering: texts to the engine's rows of numbers.

Which of them a checkpoint can answer is in its config.json; the others say so in a 400.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import struct
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from cluster.errors import EngineError
from cluster.messages import EncodeRequest, Pooling
from deployments.access_log import record_of
from deployments.body import read_json
from deployments.body_fields import parse
from deployments.concurrency import together, until_disconnect
from deployments.errors import ApiError, from_engine
from deployments.pooling_protocol import ClassifyRequest, EmbeddingRequest, InputRequest, QuestionRequest
from deployments.prompts import Ids, Prompts, check_model
from deployments.scores import best_span, context_offsets, label_probabilities, unit_length
from deployments.serving import Service, Task
from deployments.tasks import require

AT_ONCE = 64  # inputs of one HTTP request in the engine together: a thousand of them are one caller still

Rows = list[list[float]]


class Poolers:
    def __init__(self, service: Service, prompts: Prompts) -> None:
        self._service = service
        self._prompts = prompts

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/embeddings", self.embeddings, methods=["POST"])
        router.add_api_route("/classify", self.classify, methods=["POST"])
        router.add_api_route("/token_classify", self.token_classify, methods=["POST"])
        router.add_api_route("/question_answering", self.question_answering, methods=["POST"])
        return router

    async def embeddings(self, request: Request) -> Response:
        body = parse(EmbeddingRequest, await read_json(request))
        self._check(body.model, "generate", "embed")
        inputs = await self._inputs(body)
        vectors = [rows[0] for rows in await self._encode(request, inputs, body.pooling, body.priority, body.user)]
        if body.normalize:
            vectors = [unit_length(vector) for vector in vectors]
        shown = _base64 if body.encoding_format == "base64" else list
        data = [
            {"object": "embedding", "index": index, "embedding": shown(vector)} for index, vector in enumerate(vectors)
        ]
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": _usage(inputs)})

    async def classify(self, request: Request) -> Response:
        body = parse(ClassifyRequest, await read_json(request))
        self._check(body.model, "classify")
        inputs = await self._inputs(body)
        answers = await self._encode(request, inputs, "last", body.priority, body.user)
        data = [{"index": index} | self._classified(rows[0]) for index, rows in enumerate(answers)]
        return JSONResponse({"object": "list", "model": body.model, "data": data, "usage": _usage(inputs)})

    async def token_classify(self, request: Request) -> Response:
        body = parse(ClassifyRequest, await read_json(request))
        self._check(body.model, "token_classify")
        inputs = await self._inputs(body)
        answers = await self._encode(request, inputs, "all", body.priority, body.user)
        data = [
            {
                "index": index,
                "tokens": [
                    {"id": token, "token": self._prompts.tokenizer.token_text(token)} | self._classified(row)
                    for token, row in zip(ids, rows, strict=True)
                ],
            }
            for index, (ids, rows) in enumerate(zip(inputs, answers, strict=True))
        ]
        return JSONResponse({"object": "list", "model": body.model, "data": data, "usage": _usage(inputs)})

    async def question_answering(self, request: Request) -> Response:
        body = parse(QuestionRequest, await read_json(request))
        self._check(body.model, "question_answering")
        question = await self._prompts.encode(body.question)
        context = await self._prompts.encode(body.context)
        ids = self._prompts.check([*question, *context], "context", room=0)
        [rows] = await self._encode(request, [ids], "all", body.priority, body.user)
        offsets = context_offsets(context, self._prompts.tokenizer.incremental())
        span = best_span(rows[len(question) :], offsets, body.max_answer_tokens)
        start, end = min(span.start, len(body.context)), min(span.end, len(body.context))
        answer = body.context[start:end]
        stripped = answer.strip()
        start += len(answer) - len(answer.lstrip())
        return JSONResponse(
            {
                "answer": stripped,
                "score": span.score,
                "start": start,
                "end": start + len(stripped),
                "usage": _usage([ids]),
            }
        )

    async def _inputs(self, body: InputRequest) -> list[Ids]:
        return [
            self._prompts.check(ids, "input", room=0, truncate=body.truncate_prompt_tokens)
            for ids in await self._prompts.encode_all(body.input, body.add_special_tokens)
        ]

    async def _encode(
        self, request: Request, inputs: Sequence[Ids], pooling: Pooling, priority: int, user: str
    ) -> list[Rows]:
        """The rows of each input; all of them, or the ApiError of the first that fails."""
        record, limits = record_of(request.scope), self._service.live.limits
        record.request_id = f"embd-{secrets.token_hex(12)}"
        record.prompt_tokens = sum(map(len, inputs))
        deadline_s = time.monotonic() + limits.request_timeout_s
        places = asyncio.Semaphore(AT_ONCE)

        async def one(index: int, ids: Ids) -> Rows:
            async with places:
                encode = EncodeRequest(
                    f"{record.request_id}-{index}",
                    tuple(ids),
                    pooling,
                    priority=priority,
                    user=f"{record.key or ''}:{user}",
                    deadline_s=deadline_s,
                )
                with self._service.metrics.timer(choices=1) as timer:
                    rows = await self._service.engine.encode(encode)
                    timer.whole()
                return rows

        try:
            async with asyncio.timeout(limits.request_timeout_s):
                work = together(one(index, ids) for index, ids in enumerate(inputs))
                rows = await until_disconnect(request.receive, work)
        except (TimeoutError, EngineError) as error:
            # The engine keeps the deadline as well, and does not start what comes too late.
            if isinstance(error, EngineError) and time.monotonic() < deadline_s:
                raise from_engine(error, self._service.pace.retry_after_s) from None
            message = f"The answer took longer than {limits.request_timeout_s:g} s, limits.request_timeout_s here."
            raise ApiError(504, message, code="deadline_exceeded") from None
        self._service.pace.finished()
        return rows

    def _classified(self, scores: Sequence[float]) -> dict[str, Any]:
        probs = label_probabilities(scores)
        label = self._service.engine.labels[probs.index(max(probs))]
        return {"label": label, "probs": probs, "num_classes": len(probs)}

    def _check(self, model: str, *tasks: Task) -> None:
        check_model(model, self._service.model_names)
        require(self._service.task, *tasks)


def _base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's client reads it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _usage(inputs: Sequence[Ids]) -> dict[str, int]:
    tokens = sum(map(len, inputs))
    return {"prompt_tokens": tokens, "total_tokens": tokens}
