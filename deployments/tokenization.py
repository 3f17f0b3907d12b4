"""POST /tokenize and /detokenize: text to ids and back, as the model sees it. Need the tokenizer, not the engine."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from deployments.body import read_json
from deployments.body_fields import parse
from deployments.chat_protocol import TokenizeRequest
from deployments.prompts import Prompts, check_model
from deployments.protocol import DetokenizeRequest
from deployments.serving import Service


class Tokenization:
    def __init__(self, service: Service, prompts: Prompts) -> None:
        self._service = service
        self._prompts = prompts

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/tokenize", self.tokenize, methods=["POST"])
        router.add_api_route("/detokenize", self.detokenize, methods=["POST"])
        return router

    async def tokenize(self, request: Request) -> Response:
        body = parse(TokenizeRequest, await read_json(request))
        check_model(body.model, self._service.model_names)
        if body.messages is not None:
            ids = await self._prompts.of_chat(body.messages, body.tools, body.add_generation_prompt)
        else:
            ids = list(await self._prompts.encode(body.prompt or "", body.add_special_tokens))
        longest = self._service.engine.max_model_len
        return JSONResponse({"count": len(ids), "max_model_len": longest, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        body = parse(DetokenizeRequest, await read_json(request))
        check_model(body.model, self._service.model_names)
        self._prompts.check_ids(body.tokens, "tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(self._prompts.tokenizer.decode, body.tokens)})
