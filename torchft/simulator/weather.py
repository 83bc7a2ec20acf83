"""`Weather`: what an earlier release had for a `NetworkModel` and a `FaultSchedule` in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchft.simulator.faults import FaultSchedule
from torchft.simulator.network import NetworkModel

__all__ = ["Weather", "split_weather"]

_OF_NETWORK = ("nodes", "heartbeat_timeout_s")


def split_weather(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the fields of a `Weather` into those of a `NetworkModel` and of a `FaultSchedule`."""
    network = {name: value for name, value in fields.items() if name in _OF_NETWORK}
    return network, {name: value for name, value in fields.items() if name not in network}


class Weather(NetworkModel):
    """Deprecated: a `NetworkModel` that carries a `FaultSchedule`. Give the two by themselves."""

    faults: FaultSchedule

    def __init__(self, **fields: Any) -> None:
        network, faults = split_weather(fields)
        super().__init__(**network)
        object.__setattr__(self, "faults", FaultSchedule(**faults))
