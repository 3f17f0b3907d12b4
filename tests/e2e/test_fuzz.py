"""What schemathesis makes of the published description, against a running server: no answer is a mistake of ours.

tests/unit/test_http_openapi.py has more cases, with an engine that follows a script; here the real one gets them.
"""

from __future__ import annotations

import os
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error

from deployments.openapi import document
from tests.e2e.server import Server

ROUTES = ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"]
CASES = 200 if os.environ.get("MIXTRAL_TEST_ALL") else 12


config = schemathesis.Config.from_dict({"phases": {"coverage": {"enabled": False}}})
schema = schemathesis.openapi.from_dict(document(), config=config).include(path=ROUTES)


@schema.parametrize()
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_is_a_mistake_of_ours(case: Any, server: Server) -> None:
    if isinstance(case.body, dict) and case.path.startswith("/v1/"):
        case.body["model"] = "tiny"
        if case.path != "/v1/embeddings":  # what is asked for in thousands is computed in thousands
            case.body |= {"max_tokens": 4, "max_completion_tokens": None, "n": 2}
            if case.path == "/v1/completions":
                case.body.pop("max_completion_tokens")
    case.call_and_validate(base_url=server.url, checks=[not_a_server_error])
