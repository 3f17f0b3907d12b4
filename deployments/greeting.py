"""What the command line says once the model answers."""

from __future__ import annotations

import json

from deployments.config_file import HttpOptions
from deployments.resolve import Resolved


def greeting(resolved: Resolved, address: HttpOptions, route_prefix: str) -> str:
    """What to paste next."""
    host = "127.0.0.1" if address.host in ("0.0.0.0", "::") else address.host  # noqa: S104
    host = f"[{host}]" if ":" in host else host
    url = f"http://{host}:{address.port}{route_prefix.rstrip('/')}"
    auth = resolved.settings.auth
    key = ' -H "Authorization: Bearer $KEY"' if auth.api_keys_env or auth.api_keys_file else ""
    body = json.dumps(
        {"model": resolved.model_names[0], "messages": [{"role": "user", "content": "Who are you?"}]},
        ensure_ascii=False,
    )
    return (
        f"{resolved.model_names[0]} answers at {url} (Ctrl-C ends it). Try:\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'\n"
    )
