"""What the classes that Ray Data makes actors of have in common."""

import functools
from typing import Any, TypeVar

from prophy.errors import ProPhyError

Stage = TypeVar("Stage", bound=type)


def told_by_the_first_call(stage: Stage) -> Stage:
    """Has a stage's first call raise the `ProPhyError` of its constructor: a user shall read its sentence.

    What a constructor raises, Ray turns into text with a traceback, after it has tried it in other actors.
    What a call raises ends the graph, and comes out as it is.
    """
    construct, call = stage.__init__, stage.__call__  # type: ignore[misc]

    @functools.wraps(construct)
    def constructed(self: Any, *arguments: Any, **options: Any) -> None:
        self._mistake = None
        try:
            construct(self, *arguments, **options)
        except ProPhyError as mistake:
            self._mistake = mistake

    @functools.wraps(call)
    def called(self: Any, rows: Any) -> Any:
        if self._mistake is not None:
            raise self._mistake
        return call(self, rows)

    stage.__init__, stage.__call__ = constructed, called  # type: ignore[misc, method-assign]
    return stage
