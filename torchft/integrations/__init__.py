"""Callbacks for trainers that people already use. Names load on first use, with their trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchft.lazy_names import lazy_names

if TYPE_CHECKING:
    from torchft.integrations.transformers import DiLoCoCallback

__all__ = ["DiLoCoCallback"]

__getattr__, __dir__ = lazy_names(__name__, {"transformers": ["DiLoCoCallback"]})
