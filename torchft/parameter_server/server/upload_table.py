"""The uploads that are on their way in: one a worker and fragment."""

from __future__ import annotations

from collections.abc import Callable

from torchft.parameter_server.core.refused import NotFound
from torchft.parameter_server.core.requests import Ticket
from torchft.parameter_server.server.upload import Intake

__all__ = ["Arriving"]


class Arriving:
    """By the upload's name."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Ticket, Intake]] = {}

    def of(self, ticket: Ticket, make: Callable[[], Intake]) -> Intake:
        """The ticket's, made where it is new; an older one of the same worker is given up."""
        if ticket.upload not in self._found:
            mine = (ticket.who.worker, ticket.fragment)
            self._drop(lambda other, _: (other.who.worker, other.fragment) == mine)
            self._found[ticket.upload] = ticket, make()
        return self._found[ticket.upload][1]

    def named(self, upload: str) -> tuple[Ticket, Intake]:
        """Raises NotFound."""
        if upload not in self._found:
            raise NotFound("there is no such upload: ask for a ticket again")
        return self._found[upload]

    def done(self, upload: str) -> None:
        """It is here, and its file is somebody else's from now on."""
        del self._found[upload]

    def drop(self, intake: Intake) -> None:
        """Give one up."""
        self._drop(lambda _, other: other is intake)

    def drop_all_of(self, worker: str) -> None:
        """It is a worker no more: nobody will send the rest."""
        self._drop(lambda ticket, _: ticket.who.worker == worker)

    def _drop(self, unwanted: Callable[[Ticket, Intake], bool]) -> None:
        for name, (ticket, intake) in list(self._found.items()):
            if unwanted(ticket, intake):
                intake.drop()
                del self._found[name]
