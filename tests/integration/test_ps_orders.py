"""The admin changes the outer optimizer while the run goes on; and what a page may show and do."""

from __future__ import annotations

import asyncio
import http.client
import re
from pathlib import Path

import pytest
import torch
from helpers.ps import options
from helpers.waiting import until
from integration.test_ps_faults import TOKENS, Voice
from integration.test_ps_restarts import server_at, weights_at

from torchft.errors import SettingsError
from torchft.parameter_server.auth import Scope
from torchft.parameter_server.core.chunks import Chunks
from torchft.parameter_server.core.options import OuterOptions, ServerOptions
from torchft.parameter_server.core.refused import Forbidden, Refused
from torchft.parameter_server.core.requests import Registration, SubmissionOffer
from torchft.parameter_server.core.rules import Mode
from torchft.parameter_server.core.submission import Submission
from torchft.parameter_server.server import checkpoints
from torchft.parameter_server.server.page import headers, page
from torchft.parameter_server.server.state import ServerState
from torchft.quantization import Identity

ORDER = "/v1/control/update_optimizer"


def voices(server: str) -> tuple[Voice, Voice]:
    voice, admin = Voice(server), Voice(server, "admin", Scope.ADMIN)
    voice.begin()
    return voice, admin


def submit(voice: Voice, base: int, value: float = 0.1) -> None:
    voice.submit(value, base, base + 1)
    until(lambda: voice.news()["version"] == base + 1, "a round")


def rounds_with_a_change(voice: Voice, admin: Voice) -> str:
    """Two rounds, an order, two more, another, one more: the identity of the weights then."""
    for base in range(5):
        if base == 2:
            said = admin.client.post(ORDER, {"lr": 0.25, "momentum": 0.5})
            assert said == {"status": "ok", "outer_lr": 0.25, "outer_momentum": 0.5}
        if base == 4:
            admin.client.post(ORDER, {"momentum": 0.0})
        submit(voice, base)
    return weights_at(voice)


@pytest.mark.parametrize("save", [False, True], ids=["killed", "told to end"])
def test_an_order_of_how_many_workers_there_are_outlives_the_server_until_other_flags_are_given(
    tmp_path: Path, save: bool
) -> None:
    opts = options(tmp_path, workers=3, min_workers=2, save_every=100)
    server = server_at(opts).start()
    voice, admin = voices(server.address)
    until(lambda: voice.status()["checkpoints"], "the first checkpoint")
    order = {"num_workers": 1, "min_workers": 1}
    admin.client.post("/v1/control/update_num_workers", order)
    submit(voice, 0)
    server.stop(save=save)
    for base in (1, 2):
        with server_at(opts) as again:
            submit(Voice(again.address), base)
    with server_at(options(tmp_path, workers=4, min_workers=2, save_every=100)) as again:
        status = Voice(again.address).status()
        assert (status["num_workers"], status["min_workers"]) == (4, 2)


MODES = {
    "synchronous": {},
    "one by one": {"mode": Mode.ASYNCHRONOUS, "outer_optimizer": OuterOptions(dn_buffer_size=2)},
}


@pytest.mark.parametrize("save", [False, True], ids=["killed", "told to end"])
@pytest.mark.parametrize("mode", MODES)
def test_a_change_of_the_outer_optimizer_outlives_the_server(
    tmp_path: Path, mode: str, save: bool
) -> None:
    opts = options(tmp_path, workers=1, save_every=100, **MODES[mode])
    server = server_at(opts).start()
    before = rounds_with_a_change(*voices(server.address))
    server.stop(save=save)
    with server_at(opts) as again:
        voice = Voice(again.address)
        assert weights_at(voice) == before, "the same bits"
        status = voice.status()
        assert (status["outer_lr"], status["outer_momentum"]) == (0.25, 0.0)
        submit(voice, 5)
        after = weights_at(voice)
    with server_at(options(tmp_path / "other", workers=1, **MODES[mode])) as whole:
        voice, admin = voices(whole.address)
        assert rounds_with_a_change(voice, admin) == before
        submit(voice, 5)
        assert weights_at(voice) == after, "and so is what comes later"


def test_a_change_that_cannot_be_changes_nothing(tmp_path: Path) -> None:
    with server_at(options(tmp_path, workers=1)) as server:
        voice, admin = voices(server.address)
        with pytest.raises(Forbidden, match="admin, not worker"):
            voice.client.post(ORDER, {"lr": 0.1})
        for wrong, words in [
            ({"lr": 0}, "above 0"),
            ({"momentum": 1}, "below 1"),
            ({"lr": "much"}, "must be a number"),
            ({"lr": float("inf")}, "must be a finite number"),
            ({}, "give lr, momentum, or both"),
            ({"lr": 1, "decay": 1}, "give lr, momentum, or both"),
        ]:
            with pytest.raises(Refused, match=words):
                admin.client.post(ORDER, wrong)
        assert (voice.status()["outer_lr"], voice.status()["outer_momentum"]) == (0.7, 0.9)


# An error of ours that must not come back: the checkpoint had the round, and not its step.
def test_a_checkpoint_that_is_asked_for_in_the_moment_a_round_closes_has_its_step(
    tmp_path: Path,
) -> None:
    asyncio.run(_close_and_save(options(tmp_path, workers=1, save_every=100)))
    saved = checkpoints.Checkpoints(tmp_path / "checkpoints", 0).newest()
    assert saved is not None
    assert saved[1]["rounds"]["versions"] == [row["version"] for row in saved[1]["rows"]] == [1]


async def _close_and_save(opts: ServerOptions) -> None:
    state, voice = ServerState(opts), Voice("none:1", scope=None)
    await state.open()
    wished = {"sync_every": 5, "codec": "fp32", "fragments": 1}
    registration = {**voice.who, "model": voice.shape.to_json(), "wished": wished}
    one = Registration.of(registration)
    await state.register(one)
    chunks = Chunks(voice.shape.size(0), Identity())
    row = torch.ones(1, chunks.n)
    data = memoryview(bytearray(chunks.encode(0, row)))
    await state.take_chunk(state.initial(one.who, 0), 0, data)
    await state.finish_initial()
    offer = SubmissionOffer(
        Submission(one.who.worker, one.who.session, 0, 0, 1, 5, 5, "upload"),
        voice.shape.fingerprint,
    )
    upload = state.offer(offer)["upload"]
    await state.take_chunk(state.upload(upload), 0, data)
    state.finish(upload)
    await state.save()
    await state.close(save=False)


def get(server: str, path: str) -> http.client.HTTPResponse:
    host, port = server.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.request("GET", path)
    return connection.getresponse()


@pytest.mark.parametrize("path", ["/", "/dashboard"])
def test_the_page_is_for_everybody_and_says_nothing_by_itself(tmp_path: Path, path: str) -> None:
    with server_at(options(tmp_path, workers=1)) as server:
        voices(server.address)
        reply = get(server.address, path)
        assert reply.status == 200
        assert reply.headers.get_content_type() == "text/html"
        assert reply.read().decode() == page(), "whoever asks gets the same"
        policy = reply.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert get(server.address, "/v1/status").status == 401


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = page()
    assert not re.findall(r"(?:src|href)\s*=", html)
    assert [url for url in re.findall(r"https?://[^\"']+", html) if "w3.org" not in url] == []
    assert not re.findall(r"\son\w+=|style=", html), "the policy allows no such attribute"
    assert "innerHTML" not in html, "names are text, whoever chose them"
    assert '<p id="first" hidden>To see the run, paste the token' in html, "the first view says how"
    assert '<main id="shown" hidden>' in html, "no empty tables before there is a token"
    assert "unsafe" not in headers(html)["Content-Security-Policy"]


def test_what_the_page_shows_is_in_the_status(tmp_path: Path) -> None:
    with server_at(options(tmp_path, workers=1)) as server:
        voice, admin = voices(server.address)
        submit(voice, 0)
        admin.client.post(ORDER, {"lr": 0.5})
        admin.client.post("/v1/control/kick_worker", {"worker": "v"})
        status = Voice(server.address, scope=Scope.READ).status()
        fields = set(re.findall(r"\bs\.(\w+)", page())) - {"toFixed"}
        assert fields <= status.keys()
        (one,) = status["recent_rounds"]
        assert (one["version"], one["submissions"], one["steps"]) == (1, 1, 5)
        told = [event["what"] for event in status["events"]]
        assert told[0] == "worker v is gone: it was sent away"
        assert "outer lr 0.5, momentum 0.9 from now on" in told
        assert "worker v on unknown has registered" in told
        assert sorted(event["s_ago"] for event in status["events"]) == [
            event["s_ago"] for event in status["events"]
        ], "newest first"


def test_metrics_count_what_happened(tmp_path: Path) -> None:
    with server_at(options(tmp_path, workers=1)) as server:
        voice, _ = voices(server.address)
        submit(voice, 0)
        host, port = server.address.split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        token = TOKENS.by_scope[Scope.READ]
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {token}"})
        text = connection.getresponse().read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values["diloco_rounds_total"] == values["diloco_submissions_total"] == "1"
    assert values["diloco_workers"] == "1"
    assert values["diloco_worker_deaths_total"] == "0"


def test_flags_that_differ_from_the_run_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with server_at(options(tmp_path, workers=1, save_every=1)) as server:
        submit(voices(server.address)[0], 0)
    other = options(
        tmp_path, workers=1, outer_optimizer=OuterOptions(lr=0.1), sync_every=7, codec="fp32"
    )
    with caplog.at_level("WARNING"), server_at(other) as again:
        assert Voice(again.address).status()["outer_lr"] == 0.7
    assert "outer lr 0.7 and momentum 0.9, not with 0.1 and 0.9" in caplog.text
    assert "with its own settings: sync_every 5, not 7 of the flags" in caplog.text
    assert "codec" not in caplog.text
    with pytest.raises(SettingsError):
        OuterOptions().changed(-1.0, None)
