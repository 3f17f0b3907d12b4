"""The published description of the API, and whatever schemathesis makes of it: no answer is a mistake of ours.

Some random cases of each route; MIXTRAL_TEST_ALL=1 makes it 5,000, and adds every boundary of every field.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from deployments.openapi import document
from deployments.serving import Task
from tests.unit.fake_engine import MODEL, FakeEngine, app_for, http, spelling

ROUTES = [(method, path) for path, methods in document()["paths"].items() for method in methods]
ALL = bool(os.environ.get("MIXTRAL_TEST_ALL"))
CASES = (5000 if ALL else 90) // len(ROUTES)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

TASKS: dict[str, Task] = {
    "/classify": "classify",
    "/token_classify": "token_classify",
    "/question_answering": "question_answering",
}
engine = FakeEngine(spelling("one", "two"), 200, labels=("a", "b"))
config = schemathesis.Config.from_dict({"phases": {"coverage": {"enabled": ALL}}})
schema = schemathesis.openapi.from_asgi("/openapi.json", app_for(engine), config=config)


@schema.parametrize()
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_is_a_mistake_of_ours(case: Any) -> None:
    engine.task = TASKS.get(case.path, "generate")
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = MODEL  # else nothing behind the name is ever reached
    case.call_and_validate(checks=CHECKS)


def test_every_route_is_described() -> None:
    served = app_for(FakeEngine()).openapi()["paths"]
    assert set(served) == {*document()["paths"], "/openapi.json"}


def test_every_field_of_a_body_is_described() -> None:
    schemas = document()["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert set(ChatParams.__annotations__) <= set(schemas["properties"])
    assert schemas["additionalProperties"] is False
    assert schemas["properties"]["store"] == {"enum": [False, None]}


def test_references_lead_somewhere() -> None:
    def references(value: Any) -> Any:
        if isinstance(value, dict):
            yield from [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            for item in value.values():
                yield from references(item)
        elif isinstance(value, list):
            for item in value:
                yield from references(item)

    schemas = document()["components"]["schemas"]
    found = set(references(document()))
    assert found
    assert {reference.rpartition("/")[2] for reference in found} <= set(schemas)


@pytest.mark.parametrize("needs_key", [False, True])
async def test_the_description_is_as_open_as_the_rest(needs_key: bool) -> None:
    args = {"auth": {"api_keys_env": "KEYS"}} if needs_key else {}
    async with http(FakeEngine(), args, environment={"KEYS": "a"}) as client:
        response = await client.get("/openapi.json")
    assert response.status_code == (401 if needs_key else 200)
