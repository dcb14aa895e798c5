"""Where all ranks of a job stand, as the deciding watcher asks the other nodes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ....configs.strict_json import expect_list
from ....parallel.record.stand import Stand
from ....parallel.record.stand_text import load_stand
from .watch_link import WatchLink

_AGAIN_S = 0.5
"""After answers that gave no cause."""
_ANSWER_S = 1.0
"""For the other nodes to answer."""


class Inquiry:
    """What was asked, and the answers."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """What was asked is of a mesh that is left."""
        self._asked_at = self._not_before = 0.0
        self.answers: dict[int, Stand] = {}
        self.impatient = self.user = False
        """Whether whoever is waited for is taken, late or not; whether an error is a mistake of the user's."""

    def ask(self, link: WatchLink, now: float, *, impatient: bool, stacks: bool) -> None:
        """Asks all nodes, if that was not done just now."""
        self.impatient = self.impatient or impatient
        if not self._asked_at and now > self._not_before:
            self._asked_at, self.answers = now, {}
            link.tell(ask=stacks)

    def hear(self, message: dict[str, Any], slots: Collection[int]) -> None:
        """An answer of the node that has these slots.

        Raises:
            JsonError: it is none.
        """
        stands = [load_stand(each) for each in expect_list(message["stands"], "stands")]
        self.answers |= {stand.rank: stand for stand in stands if stand.rank in slots}
        self.user = self.user or message.get("user") is True

    def over(self, now: float, missing: int) -> bool:
        """Whether that was all that there is to hear, with the answers of so many ranks missing."""
        if not self._asked_at or (missing > 0 and now - self._asked_at <= _ANSWER_S):
            return False
        self._asked_at, self._not_before = 0.0, now + _AGAIN_S
        return True
