"""Every error that this package raises on purpose, as one tree.

    TorchftError
    ├── SettingsError            an argument, flag or variable that cannot be used
    │   ├── ClosureError         a closure, where averaged gradients are stepped with
    │   ├── IntegerAverageError  AVG of a tensor of integers or booleans
    │   ├── MissingDeviceError   no such device on this machine, or a torch without its backend
    │   └── MissingVariableError a variable that is needed is not set (also a KeyError)
    ├── PhaseError               a call that the step's phase does not allow
    │   └── NotConfiguredError   a collective before `configure` (also an AssertionError)
    ├── UnsupportedError         a backend lacks an operation (also a NotImplementedError)
    ├── QuorumError              no quorum could be formed; says who was missing and why
    │   └── StateLostError       the only holders of a committed step are gone
    ├── MismatchError            this group differs from the others: shapes, world size, wire
    │   └── SharedDeviceError    another member of the process group is on the same device
    ├── StateDictError           registered state cannot travel, or a donor's cannot be loaded
    ├── CheckpointError          a checkpoint on disk could not be written or read
    ├── DeviceLostError          an accelerator failed: this process must leave the job
    ├── UnreachableError         no connection within the connect timeout (also a TimeoutError)
    ├── TransferTimeoutError     live state stopped moving (also a TimeoutError, and a URLError)
    ├── StepError                something went wrong inside one step: the step is discarded
    │   ├── CollectiveError      a collective failed, or a member was lost while it ran
    │   │   ├── ChildLostError   the child process of a subprocess group died (also an OSError)
    │   │   └── MeetingTimeoutError  members did not come to `configure` (also a TimeoutError)
    │   ├── NotFiniteError       an average has NaN or infinity in it: all groups discard the step
    │   └── HealError            live state could not be fetched
    │       └── DonorRefusedError  the donor said that it gives no state (also an HTTPError)
    └── DiscardedTooOften        more discarded steps in a row than `max_retries` allows

A deadline that passes is the standard `TimeoutError`. Each message names the cause (which replica,
step, phase or setting) and the next thing to do.
"""

from __future__ import annotations

from email.message import Message
from urllib.error import HTTPError, URLError

__all__ = [
    "CheckpointError",
    "ChildLostError",
    "ClosureError",
    "CollectiveError",
    "DeviceLostError",
    "DiscardedTooOften",
    "DonorRefusedError",
    "HealError",
    "IntegerAverageError",
    "MeetingTimeoutError",
    "MismatchError",
    "MissingDeviceError",
    "MissingVariableError",
    "NotConfiguredError",
    "NotFiniteError",
    "PhaseError",
    "QuorumError",
    "SettingsError",
    "SharedDeviceError",
    "StateDictError",
    "StateLostError",
    "StepError",
    "TorchftError",
    "TransferTimeoutError",
    "UnreachableError",
    "UnsupportedError",
]


class TorchftError(RuntimeError):
    """The root: catch this to catch all of ours."""


class SettingsError(TorchftError, ValueError):
    """An argument, flag or environment variable that cannot be used as it is."""


class ClosureError(SettingsError, AssertionError):
    """An optimizer computes the loss again in its step, after the gradients were averaged."""


class IntegerAverageError(SettingsError):
    """AVG of integers or booleans, which no backend divides alike: use SUM and divide."""


class MissingDeviceError(SettingsError):
    """This machine has no device of the kind that is asked for, or torch no backend for it."""


class MissingVariableError(SettingsError, KeyError):
    """An environment variable is neither set nor given as an argument; says which one of both."""

    __str__ = RuntimeError.__str__  # a KeyError quotes its message


class PhaseError(TorchftError):
    """A call that does not fit the phase that the step is in."""


class NotConfiguredError(PhaseError, AssertionError):
    """A process group was used before `configure`, or after `shutdown`."""


class UnsupportedError(TorchftError, NotImplementedError):
    """A process group has no such operation; the message says what to use in its place."""


class QuorumError(TorchftError):
    """No quorum could be formed for a reason other than time."""


class StateLostError(QuorumError):
    """Every group that held the last committed step is gone; the message names the two ways on."""


class MismatchError(TorchftError):
    """This group cannot average with the others: another model, world size or wire version."""


class SharedDeviceError(MismatchError):
    """Two members of a process group are on one device, which its backend cannot serve."""


class StateDictError(TorchftError):
    """Registered state cannot be sent to another group, or a donor's cannot be loaded here."""


class CheckpointError(TorchftError):
    """A checkpoint on disk could not be written or read; says which one and why."""


class DeviceLostError(TorchftError):
    """An accelerator failed in such a way that this process cannot use it any more."""


class UnreachableError(TorchftError, TimeoutError):
    """No connection could be made within the connect timeout; names the address."""


class TransferTimeoutError(TorchftError, TimeoutError, URLError):
    """No byte of a state moved within the timeout of a transfer, or far too few in all."""

    def __init__(self, message: str) -> None:
        URLError.__init__(self, message)

    __str__ = TimeoutError.__str__


class StepError(TorchftError):
    """One step failed and is discarded; the next step may succeed."""


class CollectiveError(StepError):
    """A collective failed, was abandoned, or lost a member while it ran."""


class ChildLostError(CollectiveError, OSError):
    """The child process of a subprocess group died, hung and was killed, or was shut down."""


class MeetingTimeoutError(CollectiveError, TimeoutError):
    """Members of a process group, or the store where they meet, did not come within its timeout."""


class NotFiniteError(StepError):
    """An average has NaN or infinity in it: every group discards the step."""


class HealError(StepError):
    """The state of a live peer could not be fetched."""


class DonorRefusedError(HealError, HTTPError):
    """A donor answered that there is no such state to be had from it.

    Attributes:
        code: as of HTTP: 400 it offers another step, 404 it knows no such request, 500 it cannot
            read its state, or that cannot travel, 503 it offered none in time.
    """

    def __init__(self, message: str, code: int) -> None:
        HTTPError.__init__(self, "", code, message, Message(), None)

    def __str__(self) -> str:
        return str(self.msg)

    @property
    def is_lasting(self) -> bool:
        """Whether asking the same donor again is of no use, unless its state changes."""
        return self.code == 500


class DiscardedTooOften(TorchftError):
    """More steps in a row were discarded than `max_retries` allows."""
