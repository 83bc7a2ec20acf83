"""Environment variables: they win over arguments, and what cannot be used is named."""

from __future__ import annotations

from datetime import timedelta

import pytest

from torchft import settings
from torchft.errors import SettingsError


def test_a_timeout_variable_wins_over_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.timeout("TORCHFT_TIMEOUT_SEC", timedelta(seconds=3)) == timedelta(seconds=3)
    monkeypatch.setenv("TORCHFT_TIMEOUT_SEC", "7")
    assert settings.timeout("TORCHFT_TIMEOUT_SEC", timedelta(seconds=3)) == timedelta(seconds=7)


@pytest.mark.parametrize("value", ["soon", "1.5", "0", "-1"])
def test_an_unusable_timeout_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TORCHFT_TIMEOUT_SEC", value)
    with pytest.raises(SettingsError, match="TORCHFT_TIMEOUT_SEC"):
        settings.timeout("TORCHFT_TIMEOUT_SEC", timedelta(seconds=3))


def test_a_missing_variable_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SettingsError, match="RANK is not set: start with torchrun"):
        settings.required("RANK", "start with torchrun")
