"""What an operator may change while the server runs, through Serve's user_config:

    deployments: [{name: ingress, user_config: {limits: {max_n: 4}, auth: {api_keys_file: /keys/new}}}]

Whatever user_config does not say is as args have it. Requests that run keep the limits they came in under.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from deployments.auth import Keys
from deployments.settings import Auth, Limits, Section, Settings, SettingsError
from deployments.validation import describe

logger = logging.getLogger(__name__)


class UserConfig(Section):
    limits: Limits = Limits()
    auth: Auth = Auth()


class Live:
    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self._settings = settings
        self._environment = environment
        self.limits = settings.limits
        self.keys = Keys(settings.auth, environment)
        self.open_metrics = settings.auth.open_metrics
        self.problem: str | None = None  # with the last change; the one before is in force

    def apply(self, user_config: Mapping[str, Any] | None) -> None:
        """Take over all of it or nothing; SettingsError says why nothing."""
        base = {"limits": self._settings.limits.model_dump(), "auth": self._settings.auth.model_dump()}
        given = dict(user_config or {})
        for section, fields in base.items():
            if isinstance(given.get(section, {}), Mapping):
                given[section] = fields | dict(given.get(section, {}))
        try:
            wanted = UserConfig.model_validate(given)
        except ValidationError as error:
            raise SettingsError(f"user_config: {describe(error, UserConfig)[1]}") from None
        longest = self._settings.limits.request_timeout_s
        if wanted.limits.request_timeout_s > longest:
            raise SettingsError(
                f"user_config: limits.request_timeout_s can be lowered while serving, not raised above the {longest:g} "
                "of args, which shutdowns wait for; raise it there."
            )
        keys = Keys(wanted.auth, self._environment)
        self.limits, self.keys, self.problem = wanted.limits, keys, None
        self.open_metrics = wanted.auth.open_metrics

    def change(self, user_config: Mapping[str, Any] | None) -> None:
        """apply() for a server that has users already: what is wrong is logged and shown, and all goes on as before."""
        try:
            self.apply(user_config)
        except SettingsError as error:
            self.problem = str(error)
            logger.error("the change is not made: %s", error)
