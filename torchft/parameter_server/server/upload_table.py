"""The uploads that are on their way in: one a worker and fragment."""

from __future__ import annotations

from collections.abc import Callable

from torchft.parameter_server.core.refused import NotFound
from torchft.parameter_server.core.requests import SubmissionOffer
from torchft.parameter_server.server.upload import Upload

__all__ = ["UploadTable"]


class UploadTable:
    """By the upload's name."""

    def __init__(self) -> None:
        self._uploads: dict[str, tuple[SubmissionOffer, Upload]] = {}

    def of(self, offer: SubmissionOffer, make: Callable[[], Upload]) -> Upload:
        """The offer's, made where it is new; an older one of the same worker is given up."""
        if offer.upload not in self._uploads:
            mine = (offer.who.worker, offer.fragment)
            self._drop(lambda other, _: (other.who.worker, other.fragment) == mine)
            self._uploads[offer.upload] = offer, make()
        return self._uploads[offer.upload][1]

    def named(self, name: str) -> tuple[SubmissionOffer, Upload]:
        """Raises NotFound."""
        if name not in self._uploads:
            raise NotFound("there is no such upload: ask for a ticket again")
        return self._uploads[name]

    def done(self, name: str) -> None:
        """It is here, and its file is somebody else's from now on."""
        del self._uploads[name]

    def drop(self, upload: Upload) -> None:
        """Give one up."""
        self._drop(lambda _, other: other is upload)

    def drop_all_of(self, worker: str) -> None:
        """It is a worker no more: nobody will send the rest."""
        self._drop(lambda offer, _: offer.who.worker == worker)

    def _drop(self, unwanted: Callable[[SubmissionOffer, Upload], bool]) -> None:
        for name, (offer, upload) in list(self._uploads.items()):
            if unwanted(offer, upload):
                upload.drop()
                del self._uploads[name]
