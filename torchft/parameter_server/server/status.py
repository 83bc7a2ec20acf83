"""What is going on, as JSON and as Prometheus' text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torchft.parameter_server.server.state import ServerState
from torchft.parameter_server.server.training_run import TrainingRun

__all__ = ["metrics_of", "status_of"]

_METRICS = (
    ("rounds_total", "rounds", "counter", "outer steps taken"),
    ("submissions_total", "submissions", "counter", "submissions taken"),
    ("late_total", "late", "counter", "submissions that came after their round had closed"),
    ("refused_total", "refused", "counter", "uploads refused for what was in them"),
    ("received_bytes_total", "bytes_in", "counter", "encoded numbers received"),
    ("sent_bytes_total", "bytes_out", "counter", "weight updates sent"),
    ("outer_step_seconds_total", "outer_step_s", "counter", "time of outer steps, with waiting"),
    ("checkpoints_total", "checkpoints", "counter", "checkpoints written"),
    ("workers", "workers", "gauge", "workers registered"),
    ("worker_deaths_total", "total_worker_deaths", "counter", "workers gone silent or replaced"),
    ("uptime_seconds", "uptime_s", "gauge", "time since the start"),
)
"""Name, key in the status (of a table: how many there are), Prometheus' type and help."""


def status_of(state: ServerState, now: float, uptime_s: float) -> dict[str, Any]:
    """The whole status as JSON values, for `diloco status` and the page."""
    counts, run = state.counts, state.run
    rules = state.options.rules if run is None else run.rounds.rules  # orders change them
    outer = state.options.outer_optimizer if run is None else run.outer
    evicted = counts.departures.get("silent", 0) + counts.departures.get("replaced", 0)
    return {
        "mode": rules.mode,
        "num_workers": rules.workers,
        "min_workers": rules.min_workers,
        "grace_s": rules.grace_s,
        "heartbeat_timeout": rules.heartbeat_timeout_s,
        "uptime_s": uptime_s,
        "outer_lr": outer.lr,
        "outer_momentum": outer.momentum,
        **asdict(counts),
        "total_worker_deaths": evicted,
        "recent_rounds": state.history.rounds(now),
        "events": state.history.events(now),
        "ready": run is not None and run.weights_or_none is not None,
        **({"workers": {}, "fragments": []} if run is None else _of_run(state, run, now)),
    }


def _of_run(state: ServerState, run: TrainingRun, now: float) -> dict[str, Any]:
    """What is only known once the first worker has registered."""
    workers = {
        name: {
            "hostname": state.hosts.get(name, "unknown"),
            "last_heartbeat_s_ago": now - member.heard_at,
            "silent": member.is_silent(now, run.rounds.rules),
            "steps_per_second": member.steps_per_s,
        }
        for name, member in sorted(run.rounds.members.items())
    }
    fragments = [
        {
            "version": one.version,
            "pending": sorted(one.submitters),
            "waiting": state.why_open(index),
        }
        for index, one in enumerate(run.rounds.rounds)
    ]
    return {
        "agreed": asdict(run.agreed),
        "model_params": run.shape.numel,
        "workers": workers,
        "fragments": fragments,
    }


def metrics_of(status: dict[str, Any]) -> str:
    """The counters and gauges of a status in Prometheus' text format."""
    lines: list[str] = []
    for name, key, kind, what in _METRICS:
        value = status[key]
        value = len(value) if isinstance(value, dict) else value
        lines += [f"# HELP diloco_{name} {what}", f"# TYPE diloco_{name} {kind}"]
        lines += [f"diloco_{name} {value}"]
    return "\n".join(lines) + "\n"
