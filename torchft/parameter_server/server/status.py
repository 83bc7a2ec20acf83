"""What is going on, as JSON and as Prometheus' text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchft.parameter_server.server.state import ServerState

__all__ = ["metrics_of", "status_of"]

_METRICS = (
    ("rounds_total", "counter", "outer steps taken"),
    ("submissions_total", "counter", "submissions taken"),
    ("late_total", "counter", "submissions that came after their round had closed"),
    ("refused_total", "counter", "uploads refused for what was in them"),
    ("received_bytes_total", "counter", "encoded numbers received"),
    ("sent_bytes_total", "counter", "news sent"),
    ("outer_step_seconds_total", "counter", "time spent in outer steps, waiting included"),
    ("checkpoints_total", "counter", "checkpoints written"),
    ("workers", "gauge", "workers registered"),
    ("worker_deaths_total", "counter", "workers that fell silent or were replaced"),
    ("uptime_seconds", "gauge", "time since the start"),
)


def status_of(state: ServerState, now: float, uptime_s: float) -> dict[str, Any]:
    """For `diloco status` and the page."""
    counts, run = state.counts, state.run
    rules = state.options.rules if run is None else run.rounds.rules  # orders change them
    outer = state.options.outer if run is None else run.outer
    evicted = counts.departures.get("silent", 0) + counts.departures.get("replaced", 0)
    common: dict[str, Any] = {
        "mode": rules.mode,
        "num_workers": rules.workers,
        "min_workers": rules.min_workers,
        "grace_s": rules.grace_s,
        "heartbeat_timeout": rules.heartbeat_timeout_s,
        "uptime_s": uptime_s,
        "outer_lr": outer.lr,
        "outer_momentum": outer.momentum,
        "rounds": counts.rounds,
        "submissions": counts.submissions,
        "late": counts.late,
        "refused": counts.refused,
        "departures": counts.departures,
        "total_worker_deaths": evicted,
        "bytes_in": counts.bytes_in,
        "bytes_out": counts.bytes_out,
        "outer_step_s": counts.apply_s,
        "checkpoints": counts.checkpoints,
        "workers": {},
        "fragments": [],
        "recent_rounds": state.history.rounds(now),
        "events": state.history.events(now),
        "ready": run is not None and run.weights is not None,
    }
    if run is None:
        return common
    common["agreed"] = run.agreed.to_json()
    common["model_params"] = run.shape.numel
    common["workers"] = {
        name: {
            "hostname": state.hosts.get(name, "unknown"),
            "last_heartbeat_s_ago": now - member.heard_at,
            "silent": member.is_silent(now, rules),
            "steps_per_second": member.steps_per_s,
        }
        for name, member in sorted(run.rounds.members.items())
    }
    common["fragments"] = [
        {
            "version": one.version,
            "pending": sorted(one.submitters),
            "waiting": state.why_open(index),
        }
        for index, one in enumerate(run.rounds.rounds)
    ]
    return common


def metrics_of(status: dict[str, Any]) -> str:
    """Prometheus' text format."""
    values = (
        status["rounds"],
        status["submissions"],
        status["late"],
        status["refused"],
        status["bytes_in"],
        status["bytes_out"],
        status["outer_step_s"],
        status["checkpoints"],
        len(status["workers"]),
        status["total_worker_deaths"],
        status["uptime_s"],
    )
    return "\n".join(_lines(values)) + "\n"


def _lines(values: tuple[float, ...]) -> Iterator[str]:
    for (name, kind, what), value in zip(_METRICS, values, strict=True):
        full = f"diloco_{name}"
        yield f"# HELP {full} {what}"
        yield f"# TYPE {full} {kind}"
        yield f"{full} {value}"
