"""Which routes a served model answers, and what to say on the others."""

from __future__ import annotations

from deployments.errors import invalid
from deployments.serving import Task

_ANSWERS: dict[Task, str] = {
    "generate": "generates text and embeds: ask /v1/chat/completions, /v1/completions or /v1/embeddings",
    "embed": "embeds: ask /v1/embeddings",
    "classify": "classifies texts: ask /classify",
    "token_classify": "classifies tokens: ask /token_classify",
    "question_answering": "finds answers in texts: ask /question_answering",
}


def require(served: Task, *tasks: Task) -> None:
    if served not in tasks:
        raise invalid(f"The model served here {_ANSWERS[served]}.", code="wrong_task")
