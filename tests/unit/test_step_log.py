"""One line an event: with its cause first, and with who it happened to."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from torchft.errors import HealError
from torchft.ledger import Ledger
from torchft.manager.telemetry import StepLog


def log() -> StepLog:
    group: Any = SimpleNamespace(name="g1", rank=0, replica_id="g1:uuid")
    return StepLog(group, Ledger())


@pytest.fixture
def root() -> Iterator[list[str]]:
    """What a script prints that has called `logging.basicConfig`. (pytest's own handler also hears
    loggers that do not propagate.)"""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Handler()
    logging.getLogger().addHandler(handler)
    yield said
    logging.getLogger().removeHandler(handler)


def test_an_error_is_one_line_that_names_cause_group_and_step(root: list[str]) -> None:
    log().error(12, HealError("Connection refused, healing to step 12"))
    assert root == [
        "[g1/0 - step 12] HealError: Connection refused, healing to step 12; the step is discarded"
    ]


def test_a_program_reads_the_same_event_as_fields(caplog: pytest.LogCaptureFixture) -> None:
    structured = logging.getLogger("torchft_errors")
    structured.addHandler(caplog.handler)
    try:
        log().error(12, HealError("Connection refused"))
    finally:
        structured.removeHandler(caplog.handler)
    record = next(record for record in caplog.records if record.name == "torchft_errors")
    fields = vars(record)
    assert (fields["replica_id"], fields["step"], fields["error"]) == ("g1:uuid", 12, "HealError")
