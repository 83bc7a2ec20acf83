"""Settings of server and workers that cannot be are refused before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from torchft.errors import SettingsError
from torchft.parameter_server.core.options import OuterOptions, ServerOptions
from torchft.parameter_server.core.rules import Rules
from torchft.parameter_server.worker.options import WorkerOptions

NAN, INF = float("nan"), float("inf")


# An error of ours that must not come back: with a bound of NaN there was none.
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ServerOptions(Path("x"), Rules(1), norm_bound=NAN), "norm_bound=nan"),
        (
            lambda: ServerOptions(Path("x"), Rules(1), norm_bound=INF),
            "norm_bound=inf: it must be a finite number",
        ),
        (lambda: OuterOptions(lr=NAN), "outer_lr=nan"),
        (lambda: OuterOptions(lr=INF), "outer_lr=inf"),
        (lambda: OuterOptions(momentum=NAN), "outer_momentum=nan"),
        (lambda: Rules(1, grace_s=NAN), "grace_s=nan"),
        (lambda: Rules(1, grace_s=INF), "grace_s=inf"),
        (lambda: Rules(1, heartbeat_timeout_s=NAN), "heartbeat_timeout_s=nan"),
        (lambda: WorkerOptions(heartbeat_interval_s=NAN), "heartbeat_interval_s"),
        (lambda: WorkerOptions(timeout_s=NAN), "timeout_s"),
        (lambda: WorkerOptions(mix=NAN), "mix=nan"),
        (lambda: WorkerOptions(sync_every=10**7), "at least 1 and at most 1000000"),
    ],
)
def test_a_number_that_is_none_or_has_no_end(make: Callable[[], object], name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        make()
