"""The worker's connection to its server, in two threads: one sends submissions, one heartbeats.

Whatever the network does, a submission stays pending until it is over: its encoded delta is kept,
against the base it was measured from, and is sent again after any trouble. Trouble is met with
pauses from 0.1 to 5 s. A server that does not know this process (any more) is told again who it is.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from torchft.errors import MismatchError, UnreachableError
from torchft.parameter_server.core.chunks import Chunks
from torchft.parameter_server.core.options import SharedSettings
from torchft.parameter_server.core.refused import (
    Conflict,
    Gone,
    Interrupted,
    NotFound,
    NotReady,
    Refused,
    Unfit,
)
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.core.weight_update import UpdateKind
from torchft.parameter_server.worker.download_cache import DownloadCache, DownloadedUpdate
from torchft.parameter_server.worker.options import WorkerOptions, host_name
from torchft.parameter_server.worker.submissions import PendingSubmission
from torchft.quantization import Identity, codec_of
from torchft.retry import pauses

__all__ = ["ServerConnection"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

_PAUSE_S = (0.1, 5.0)
"""First and longest pause before the server is asked again."""
_WAIT_S = 2.0
"""The server answers a request for an update after this time at the latest."""
_PIECE = 1 << 20
"""Bytes that are handed to the system at once: all of them must go within the client's timeout."""
_TAKEN_ID_S = 20.0
"""How long a new process waits until the one that had its id counts as silent."""


class ServerConnection:
    """Call `connect` and `start`, then `launch` submissions: each is over when its event is set.

    Args:
        rows: the weights of a fragment, fp32 `[1, n]`, for a server that has none.
        speed: inner steps per second, asked at every sign of life.
    """

    def __init__(
        self,
        options: WorkerOptions,
        worker: str,
        shape: ModelShape,
        rows: Callable[[int], Tensor],
        speed: Callable[[], float],
    ) -> None:
        self.worker, self.session = worker, uuid.uuid4().hex
        self.shape, self.agreed = shape, options.wished
        self.recommended = 0
        """Inner steps that the server recommends."""
        self.down = threading.Event()
        """The server cannot be reached just now."""
        self.fault: Exception | None = None
        """The server is another one than it was: training with it makes no sense."""
        self.reconnections = 0
        self._options, self._rows, self._speed = options, rows, speed
        self._client, self._beat_client = options.client(), options.client()
        self._beat_s = options.heartbeat_interval_s
        self._cache = DownloadCache()
        self._submissions: list[PendingSubmission] = []
        self._work = threading.Condition()
        self._end = threading.Event()
        self._left = threading.Event()
        self._threads: list[threading.Thread] = []

    # ------------------------------------------------------------------ from the training thread

    def connect(self) -> None:
        """Register, and wait for a server that is not there yet.

        Raises:
            UnreachableError: if there was none within the option `timeout_s`.
            Refused: if the server does not take this worker.
            MismatchError: if the server has another model.
        """
        reply = self._patiently(self._register)
        self.agreed = SharedSettings(**reply["agreed"])
        self.shape = ModelShape.from_json(reply["model"])
        for difference in reply["differences"]:
            logger.warning("the server's settings hold: %s", difference)
        if reply["send_weights"]:
            self._patiently(self._send_weights)
        self._beat_s = min(self._beat_s, reply["beat_s"])

    def fetch(self, fragment: int) -> DownloadedUpdate:
        """Download the newest weights of a fragment, complete. Raises as `connect`."""

        def ask() -> DownloadedUpdate:
            update = self._ask_update(fragment, 0, "none")
            if update is None:
                raise NotReady("the server has no weights yet")
            return update

        return self._patiently(ask)

    def start(self) -> None:
        """Start the threads that send submissions and heartbeats."""
        jobs = [("diloco-connection", self._carry)]
        if self._beat_s:
            jobs.append(("diloco-beat", self._beat))
        self._threads = [threading.Thread(target=run, name=n, daemon=True) for n, run in jobs]
        for thread in self._threads:
            thread.start()

    def launch(self, submission: PendingSubmission) -> None:
        """Send a submission and download the update that answers it, in the background."""
        with self._work:
            self._submissions.append(submission)
            self._work.notify()

    def stop(self) -> None:
        """End the threads and tell the server. Harmless to repeat."""
        self._end.set()
        with self._work:
            self._work.notify()
        for thread in self._threads:
            thread.join()
        self.leave()
        self._client.close()
        self._beat_client.close()
        self._cache.close()

    def pause(self, seconds: float) -> None:
        """Wait for `seconds`, or until `stop` is called."""
        self._end.wait(seconds)

    def leave(self) -> None:
        """Tell the server that nobody need wait for this worker. Harmless to repeat."""
        if self._left.is_set():
            return
        self._left.set()
        client = self._options.client()
        try:
            client.post("/v1/deregister", self._who())
        except (UnreachableError, Refused) as error:
            logger.info("the server was not told that %s leaves: %s", self.worker, error)
        finally:
            client.close()

    # ------------------------------------------------------------------ registration

    def _who(self) -> dict[str, Any]:
        return {"worker": self.worker, "session": self.session}

    def _register(self) -> dict[str, Any]:
        request = {
            **self._who(),
            "hostname": host_name(),
            "model": self.shape.to_json(),
            "wished": asdict(self._options.wished),
            "beat_s": self._beat_s,
        }
        try:
            reply = self._client.post("/v1/register", request)
        except Unfit as error:
            raise MismatchError(str(error)) from None
        self.recommended = reply["sync_every"]
        return reply

    def _register_again(self) -> None:
        """After the server forgot this process: it was away, or was restarted."""
        reply = self._register()
        self.reconnections += 1
        if SharedSettings(**reply["agreed"]) != self.agreed:
            raise MismatchError(
                f"the server at this address has other settings than before: {reply['agreed']}, "
                f"not {asdict(self.agreed)}"
            )
        if reply["send_weights"]:
            self._send_weights()

    def _send_weights(self) -> None:
        """This worker's are the first."""
        for fragment in self.shape.fragments:
            chunks = Chunks(self.shape.size(fragment.index), Identity())
            row = self._rows(fragment.index)
            data = (memoryview(chunks.encode(i, row[:, span])) for i, span in chunks.spans())
            path = f"/v1/weights/{fragment.index}"
            try:
                self._put(path, data, chunks.nbytes, 0, **self._who())
            except NotFound:
                return  # another worker's were there first

    def _patiently(self, call: Callable[[], T]) -> T:
        """Again and again while the server is away, not ready, or knows an older process."""
        began, waits = time.monotonic(), enumerate(pauses(*_PAUSE_S))
        while True:
            try:
                return call()
            except (UnreachableError, NotReady, Conflict) as error:
                limit = self._options.timeout_s
                if isinstance(error, Conflict):
                    limit = min(limit, _TAKEN_ID_S)
                left = limit - (time.monotonic() - began)
                number, pause = next(waits)
                if left <= 0 or self._end.wait(min(pause, left)):
                    raise
                if number == 0:
                    logger.warning("%s; asking again for up to %g s", error, limit)

    # ------------------------------------------------------------------ submissions

    def _carry(self) -> None:
        waits = pauses(*_PAUSE_S)
        while not self._end.is_set():
            submissions = self._waiting_submissions()
            try:
                for submission in submissions:
                    self._advance(submission, _WAIT_S if len(submissions) == 1 else 0.1)
                waits = pauses(*_PAUSE_S)
                self.down.clear()
            except UnreachableError as error:
                self._note_down(error)
                self._send_again()
                self._end.wait(next(waits))
            except (Conflict, Interrupted, NotReady, NotFound):
                self._end.wait(next(waits))
            except (Refused, MismatchError) as error:
                self._break(error)
                return

    def _waiting_submissions(self) -> list[PendingSubmission]:
        with self._work:
            self._submissions = [
                submission for submission in self._submissions if not submission.over.is_set()
            ]
            while not self._submissions and not self._end.is_set():
                self._work.wait()
            return list(self._submissions)

    def _advance(self, submission: PendingSubmission, wait_s: float) -> None:
        try:
            if not submission.is_sent:
                self._send(submission)
            if submission.refused is None:
                submission.update = self._ask_update(
                    submission.fragment, submission.base, submission.identity, wait_s
                )
            if submission.refused is not None or submission.update is not None:
                submission.over.set()
        except Gone:
            if not self._left.is_set():
                self._register_again()
                self._send_again()

    def _send_again(self) -> None:
        """The server may have lost what it had; what it has not lost it knows by its number."""
        with self._work:
            for submission in self._submissions:
                submission.is_sent = False

    def _send(self, submission: PendingSubmission) -> None:
        ticket = {
            **self._who(),
            "fragment": submission.fragment,
            "base": submission.base,
            "number": submission.number,
            "steps": submission.steps,
            "tokens": submission.tokens,
            "fingerprint": self.shape.fingerprint,
        }
        try:
            reply = self._client.post("/v1/tickets", ticket)
            if not reply["done"]:
                have = reply["have"]
                left = submission.chunks[have:]
                path, nbytes = f"/v1/uploads/{reply['upload']}", sum(map(len, left))
                reply = self._put(path, left, nbytes, have)
        except Unfit as error:
            submission.refused = str(error)
            return
        submission.is_sent = bool(reply["done"])

    def _put(
        self, path: str, data: Iterable[memoryview], nbytes: int, have: int, **query: object
    ) -> dict[str, Any]:
        pieces = (chunk[at : at + _PIECE] for chunk in data for at in range(0, len(chunk), _PIECE))
        return self._client.put(path, pieces, nbytes, **{"from": have}, **query)

    def _ask_update(
        self, fragment: int, base: int, identity: str, wait_s: float = 0.0
    ) -> DownloadedUpdate | None:
        question = {"fragment": fragment, "base": base, "identity": identity, "wait_s": wait_s}
        reply = self._client.post("/v1/news", question)
        if "files" not in reply:
            return None
        kind = UpdateKind(reply["kind"])
        files = tuple((kind, self._download(fragment, kind, name)) for name in reply["files"])
        return DownloadedUpdate(reply["version"], reply["identity"], files, self._cache)

    def _download(self, fragment: int, kind: UpdateKind, name: str) -> Path:
        codec = Identity() if kind is UpdateKind.FULL else codec_of(self.agreed.codec)
        chunks = Chunks(self.shape.size(fragment), codec)
        return self._cache.fetch(name, chunks, partial(self._client.reading, name))

    # ------------------------------------------------------------------ signs of life

    def _beat(self) -> None:
        while not self._end.wait(self._beat_s) and not self._left.is_set():
            try:
                beat = {**self._who(), "steps_per_second": self._speed()}
                self.recommended = self._beat_client.post("/v1/heartbeat", beat)["sync_every"]
            except UnreachableError as error:
                self._note_down(error)
            except Gone:
                self._return()
            except Refused as error:
                self._break(error)
                return

    def _return(self) -> None:
        """Register again, unless a submission is pending: then the thread that sends it does so."""
        with self._work:
            busy = any(not submission.over.is_set() for submission in self._submissions)
        if busy or self._left.is_set():
            return
        try:
            self._register_again()
        except (UnreachableError, NotReady, Conflict) as error:
            logger.info("%s is not registered again yet: %s", self.worker, error)
        except (Refused, MismatchError) as error:
            self._break(error)

    def _note_down(self, error: Exception) -> None:
        if not self.down.is_set():
            logger.warning("%s; training goes on, and the work is kept", error)
            self.down.set()

    def _break(self, error: Exception) -> None:
        self.fault = error
        with self._work:
            for submission in self._submissions:
                submission.over.set()
