"""Objects that hold what belongs to one process, and so cannot be copied or pickled.

`copy.deepcopy` of a script's whole state, `torch.save` of an optimizer instead of its state, a
trainer that sends its optimizer to a worker: all of them would get half an object, or spoil this
one. They get a TypeError instead that says what to copy, before anything is touched.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

__all__ = ["Uncopied"]


class Uncopied:
    """A base class: `copy.copy`, `copy.deepcopy` and pickling raise TypeError.

    Its `__getstate__` and `__setstate__` are not asked: torch's would put hooks around the class.
    """

    copy_instead: ClassVar[str]
    """What to do, to complete the error."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"this {type(self).__name__} cannot be copied or pickled, since it holds connections "
            f"and hooks of this process: {self.copy_instead}"
        )
