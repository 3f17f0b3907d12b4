"""What an operator may change while the server runs, through Serve's user_config:

    deployments: [{name: ingress, user_config: {limits: {max_n: 4}, scheduler: {max_running: 64}}}]

Whatever user_config does not say is as args have it. Requests that run keep the limits they came in under.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from deployments.auth import Keys
from deployments.settings import Auth, Limits, Scheduler, Section, Settings, SettingsError
from deployments.validation import describe

logger = logging.getLogger(__name__)


class UserConfig(Section):
    limits: Limits = Limits()
    auth: Auth = Auth()
    scheduler: Scheduler = Scheduler()


class Live:
    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self._settings = settings
        self._environment = environment
        self.limits = settings.limits
        self.scheduler = settings.scheduler
        self.keys = Keys(settings.auth, environment)
        self.open_metrics = settings.auth.open_metrics
        self.problem: str | None = None  # with the last change; the one before is in force

    def apply(self, user_config: Mapping[str, Any] | None) -> None:
        """Take over all of it or nothing; SettingsError says why nothing."""
        base = self._settings.model_dump(include=set(UserConfig.model_fields))
        given = dict(user_config or {})
        for section, fields in base.items():
            if isinstance(given.get(section, {}), Mapping):
                given[section] = fields | dict(given.get(section, {}))
        try:
            wanted = UserConfig.model_validate(given)
        except ValidationError as error:
            raise SettingsError(f"user_config: {describe(error, UserConfig)[1]}") from None
        self._refuse_more_than_args(wanted)
        keys = Keys(wanted.auth, self._environment)
        self.limits, self.scheduler, self.keys, self.problem = wanted.limits, wanted.scheduler, keys, None
        self.open_metrics = wanted.auth.open_metrics

    def change(self, user_config: Mapping[str, Any] | None) -> None:
        """apply() for a server that has users already: what is wrong is logged and shown, and all goes on as before."""
        try:
            self.apply(user_config)
        except SettingsError as error:
            self.problem = str(error)
            logger.error("the change is not made: %s", error)

    def _refuse_more_than_args(self, wanted: UserConfig) -> None:
        """Shutdowns wait as long as args say an answer may take; Serve and the ranks have room for what they admit."""
        ceilings = [("limits", "request_timeout_s"), *(("scheduler", name) for name in Scheduler.model_fields)]
        for section, name in ceilings:
            most = getattr(getattr(self._settings, section), name)
            if getattr(getattr(wanted, section), name) > most:
                raise SettingsError(
                    f"user_config: {section}.{name} can be lowered while serving, not raised above the {most:g} of "
                    "args; raise it there."
                )
