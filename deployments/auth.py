"""Who may ask: API keys from a variable and from a file that is read again when it changes.

Only digests are kept; a key is never logged and never compared in a time that depends on it.
"""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Mapping
from hashlib import sha256

from deployments.settings import Auth, SettingsError

logger = logging.getLogger(__name__)


class Keys:
    """The accepted keys and whose they are. Without a source every caller is accepted.

    The variable holds keys with commas between; the file one a line, with a name before it if the log and the limits
    shall know it by one:  alice sk-...  A name that begins with admin makes it a key that may change the server.
    """

    def __init__(self, auth: Auth, environment: Mapping[str, str]) -> None:
        self._file = auth.api_keys_file
        self._file_state: tuple[int, int, int] | None = None
        self._from_file: dict[bytes, str] = {}
        variable = environment.get(auth.api_keys_env or "", "").encode(errors="surrogateescape")
        self._from_variable = {
            _digest(key): f"env-{number}" for number, key in enumerate(variable.split(b","), 1) if key.strip()
        }
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

    def name_of(self, authorization: str | None) -> str | None:
        """The name of the key that the Authorization header carries; None if it carries none of ours."""
        self._refresh()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = _digest(key.encode("latin-1"))  # the header's own bytes
        known = self._from_variable | self._from_file
        # Compared with every key: stopping at the first match would tell where it stands.
        names = [name for one, name in known.items() if hmac.compare_digest(digest, one)]
        return names[0] if names else None

    def accept(self, authorization: str | None) -> bool:
        """Whether the header opens what needs a key; true when no keys are configured."""
        return not self.required or self.name_of(authorization) is not None

    def accept_admin(self, authorization: str | None) -> bool:
        """Whether the header opens what changes the server: a key whose name begins with admin."""
        return not self.required or (self.name_of(authorization) or "").startswith("admin")

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
        self._from_file = {
            _digest(key): name or f"file-{number}"
            for number, line in enumerate(lines, 1)
            if not line.lstrip().startswith(b"#")
            for name, key in [_name_and_key(line)]
            if key
        }
        self._file_state = state

    def _stat(self) -> tuple[int, int, int]:
        assert self._file is not None
        status = os.stat(self._file)
        return status.st_mtime_ns, status.st_size, status.st_ino


def _name_and_key(line: bytes) -> tuple[str, bytes]:
    *name, key = line.split() or [b""]
    return b" ".join(name).decode(errors="replace")[:64], key


def _digest(key: bytes) -> bytes:
    return sha256(key.strip()).digest()
