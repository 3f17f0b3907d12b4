"""What the replica refuses before it loads anything."""

from __future__ import annotations

import pytest

from deployments.ingress import check_grace
from deployments.settings import Settings, SettingsError


def test_a_shutdown_must_wait_as_long_as_an_answer_may_take() -> None:
    settings = Settings.model_validate({"limits": {"request_timeout_s": 60}})
    check_grace(60.0, settings)
    with pytest.raises(SettingsError, match=r"20 s would cut answers.*60 s; raise the one or lower the other"):
        check_grace(20.0, settings)
