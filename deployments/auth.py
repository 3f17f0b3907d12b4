"""Who may ask: API keys from a variable and from a file that is read again when it changes.

Only digests are kept; a key is never logged and never compared in a time that depends on it.
"""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Iterable, Mapping
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.errors import ApiError
from deployments.settings import Auth, SettingsError

logger = logging.getLogger(__name__)

OPEN_ROUTES = ("/health", "/ready")  # probes have no key; /health then says its status only


class Keys:
    """The accepted keys. Without a source every caller is accepted."""

    def __init__(self, auth: Auth, environment: Mapping[str, str]) -> None:
        self._file = auth.api_keys_file
        self._file_state: tuple[int, int, int] | None = None
        self._from_file: frozenset[bytes] = frozenset()
        self._from_variable = _digests(
            environment.get(auth.api_keys_env or "", "").encode(errors="surrogateescape").split(b",")
        )
        self.required = auth.api_keys_env is not None or auth.api_keys_file is not None
        if auth.api_keys_env is not None and not self._from_variable:
            raise SettingsError(f"auth.api_keys_env: the variable {auth.api_keys_env} holds no key.")
        if self._file is not None:
            try:
                self._read()
            except OSError as error:
                raise SettingsError(f"auth.api_keys_file: {self._file} cannot be read ({error.strerror}).") from None
            if not self._from_file:
                raise SettingsError(f"auth.api_keys_file: {self._file} holds no key; write one per line.")

    def accept(self, authorization: str | None) -> bool:
        """Whether the Authorization header carries a key; true when no keys are configured."""
        if not self.required:
            return True
        self._refresh()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        digest = sha256(key.strip().encode("latin-1")).digest()  # the header's own bytes
        # Compared with every key: stopping at the first match would tell where it stands.
        matches = [hmac.compare_digest(digest, known) for known in self._from_variable | self._from_file]
        return any(matches)

    def _refresh(self) -> None:
        if self._file is None:
            return
        try:
            if self._stat() != self._file_state:
                self._read()
        except OSError as error:
            # Half of a rotation, perhaps. The keys read before stay valid, so that nobody is locked out by it.
            logger.warning(
                "auth.api_keys_file %s cannot be read (%s); its earlier keys stay", self._file, error.strerror
            )

    def _read(self) -> None:
        assert self._file is not None
        state = self._stat()
        with open(self._file, "rb") as file:
            lines = file.read(1 << 20).splitlines()
        self._from_file = _digests(line for line in lines if not line.lstrip().startswith(b"#"))
        self._file_state = state

    def _stat(self) -> tuple[int, int, int]:
        assert self._file is not None
        status = os.stat(self._file)
        return status.st_mtime_ns, status.st_size, status.st_ino


class RequireKey:
    """ASGI middleware: 401 for every route but the open ones, before anything of the request is read."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN_ROUTES:
            authorization = Headers(scope=scope).get("authorization")
            if not self.keys.accept(authorization):
                problem = "is not valid" if authorization else "is missing"
                error = ApiError(401, f"The API key {problem}; send Authorization: Bearer KEY.", code="invalid_api_key")
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _digests(keys: Iterable[bytes]) -> frozenset[bytes]:
    return frozenset(sha256(key.strip()).digest() for key in keys if key.strip())
