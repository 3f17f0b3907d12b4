"""From what clients write to token ids, and whether these fit: texts, lists of ids, and conversations."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from deployments.chat_protocol import Message
from deployments.errors import ApiError, invalid
from deployments.serving import Engine, Tokenizer
from deployments.tools import MARKER, Tool
from model.errors import TokenizerError

Ids = Sequence[int]

_PROBE_MESSAGES = [{"role": "user", "content": "a"}]
_PROBE_TOOL = {"type": "function", "function": {"name": "a", "description": "", "parameters": {"type": "object"}}}


class Prompts:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._knows_tools: bool | None = None  # not asked yet

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    async def encode(self, prompt: str | Ids, add_special_tokens: bool = True) -> Ids:
        if not isinstance(prompt, str):
            return prompt
        # Off the event loop: a body's worth of text takes long enough for every stream to notice.
        return await asyncio.to_thread(self.tokenizer.encode, prompt, add_special_tokens=add_special_tokens)

    async def encode_all(self, prompts: Iterable[str | Ids], add_special_tokens: bool) -> list[Ids]:
        return [await self.encode(prompt, add_special_tokens) for prompt in prompts]

    async def of_chat(
        self, conversation: Sequence[Message], tools: Sequence[Tool] = (), add_generation_prompt: bool = True
    ) -> list[int]:
        needs_tools = bool(tools) or any(message.tool_calls for message in conversation)
        if needs_tools and not await asyncio.to_thread(self._template_knows_tools):
            source = "tools" if tools else "messages"
            raise invalid(f"{source}: the chat template of this model knows no tools; leave them out.", source)
        turns = [message.for_template() for message in conversation]
        try:
            return await asyncio.to_thread(
                self.tokenizer.chat_prompt,
                turns,
                add_generation_prompt=add_generation_prompt,
                tools=[tool.for_template() for tool in tools] or None,
            )
        except TokenizerError as error:
            raise invalid(f"messages: {error}", "messages") from None

    def marker_id(self) -> int | None:
        """The token that begins tool calls, where the model has one of its own for that."""
        ids = self.marker()
        return ids[0] if len(ids) == 1 else None

    def marker(self) -> Ids:
        """What a prompt ends with when a call must follow."""
        return self.tokenizer.encode(MARKER, add_special_tokens=False)

    def check(self, ids: Ids, source: str, *, room: int, truncate: int | None = None) -> Ids:
        """The prompt, shortened to its end where that was asked for; a 400 if it leaves no room for so many tokens."""
        self.check_ids(ids, source)
        longest = self._engine.max_model_len
        if truncate is not None:
            keep = max(longest - room, 1) if truncate < 0 else truncate
            ids = ids[-keep:]
        if not ids:
            raise invalid(f"{source}: the prompt has no tokens; send at least one.", source)
        if len(ids) + min(room, 1) > longest:
            message = f"{source}: the prompt has {len(ids)} tokens and this server takes {longest}"
            message += ", at least one of them for the answer." if room else "."
            raise invalid(message, source, code="context_length_exceeded")
        return ids

    def check_ids(self, ids: Ids, source: str) -> None:
        size = self.tokenizer.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < size:
            raise invalid(f"{source}: token ids of this model are 0 to {size - 1}.", source)

    def _template_knows_tools(self) -> bool:
        """Whether it writes them anywhere: a template that does not would keep them from the model in silence."""
        if self._knows_tools is None:
            chat_prompt = self.tokenizer.chat_prompt
            try:
                self._knows_tools = chat_prompt(_PROBE_MESSAGES, tools=[_PROBE_TOOL]) != chat_prompt(_PROBE_MESSAGES)
            except TokenizerError:
                self._knows_tools = False
        return self._knows_tools


def check_model(name: str | None, names: Sequence[str]) -> None:
    if name is not None and name not in names:
        possible = ", ".join(names)
        raise ApiError(
            404, f"There is no model {name[:80]!r} here; possible: {possible}.", param="model", code="model_not_found"
        )
