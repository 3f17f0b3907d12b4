"""The table of docs/openai.md: which fields of the generation routes do something here, from the request types.

python -m deployments.field_table
"""

from __future__ import annotations

import json

from deployments.chat_protocol import ChatRequest
from deployments.protocol import NOTHING_TO_DO, CompletionRequest, GenerationRequest

HEADER = """\
| field | completions | chat | notes |
|---|---|---|---|
"""


def markdown() -> str:
    names = sorted({name for kind in (CompletionRequest, ChatRequest) for name in (*kind.model_fields, *kind.neutral)})
    return HEADER + "".join(_row(name) for name in names)


def _row(name: str) -> str:
    cells = [_cell(name, kind) for kind in (CompletionRequest, ChatRequest)]
    notes = {
        field.description: None
        for kind in (CompletionRequest, ChatRequest)
        if (field := kind.model_fields.get(name)) is not None and field.description
    }
    return f"| `{name}` | {cells[0]} | {cells[1]} | {'; '.join(notes)} |\n"


def _cell(name: str, kind: type[GenerationRequest]) -> str:
    if name in NOTHING_TO_DO:
        return "accepted, nothing to do"
    if name in kind.model_fields:
        return "honoured"
    if name not in kind.neutral:
        return "no such field"
    values = " or ".join(f"`{json.dumps(value)}`" for value in kind.neutral[name])
    return f"only {values}" if values else "refused"


if __name__ == "__main__":
    print(markdown(), end="")
