"""Which checkpoint a job goes on from: the newest that all its ranks together can read, wherever it lies.

Every byte of it is read and compared before it is chosen. In folders of nodes only what all nodes have of one save of
this very run counts, and only if each rank finds there what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ....configs.errors import Problem, UserError
from ....configs.strict_json import JsonError
from ....parallel.comm.host_tree import joined
from ....parallel.global_tensor import GlobalTensor
from .. import files
from ..check import all_damaged, missing
from ..io import lacking
from ..manifest import Damaged, damaged_files, is_finite, read_manifest, read_state
from ..names import checkpoints, step_folder
from ..team import Team
from ..telling import Telling
from .local import LocalMark, foreign, host_words

T = TypeVar("T")
Needed = Callable[[], Mapping[str, GlobalTensor]]
"""The pieces that this rank is to read."""


@dataclass(frozen=True)
class CheckpointTier:
    """A folder of checkpoints, or each node's own.

    Args:
        directory: as this rank sees it.
        team: all ranks.
        telling: of what is found.
        run: whose checkpoints are believed; none: all that lie there.
    """

    directory: Path
    team: Team
    telling: Telling
    run: str | None = None

    @cached_property
    def candidates(self) -> dict[int, bool]:
        """Steps of which there are checkpoints, and whether they are without NaN."""
        found = self.team.of_leaders("resuming", self._published)
        for reason in dict.fromkeys(reason for _, reason in found if reason is not None):
            self.telling.say(f"{reason}: what lies there is not used")
        steps = [mine for mine, _ in found]
        for step in sorted(set().union(*steps), reverse=True):
            without = [
                self._host(rank) for rank, have in zip(self.team.leaders, steps, strict=True) if step not in have
            ]
            if without:
                path = step_folder(self.directory, step)
                reason = f"{host_words(without)} {'have' if len(without) > 1 else 'has'} no part of it"
                self.telling.event("checkpoint_incomplete", step=step, path=str(path), reason=reason)
                self.telling.say(f"the nodes' own checkpoint of step {step} is not used: {reason}")
        return {step: all(have[step] for have in steps) for step in steps[0] if all(step in have for have in steps)}

    def _published(self) -> tuple[dict[int, bool], str | None]:
        reason = foreign(self.directory) if self.run is not None else None
        if reason is not None:
            return {}, reason
        files.clean(self.directory)
        return {step: is_finite(path) is not False for step, path in checkpoints(self.directory)}, None

    def _host(self, rank: int) -> str:
        return self.team.hosts[rank] if self.team.hosts else ""

    def problems(self, path: Path, needed: Needed | None = None) -> list[str]:
        """Why a checkpoint cannot be gone on from, the same on all ranks; every byte of it is read."""
        known = self.team.first("verifying", lambda: _or_reason(read_manifest, path))

        def read() -> list[str]:
            if isinstance(known, str):
                return [known] if self.team.leads else []
            # Largest first, dealt out in turn: shares of about the same bytes.
            sizes = {name: about.size for name, about in known.files.items()}
            order = sorted(sizes, key=lambda name: (-sizes[name], name))
            own = self.team.sharing
            share = {name: known.files[name] for name in order[own.index(self.team.rank) :: len(own)]}
            return list(damaged_files(path, share).values())

        problems = self._all(read) or self._all(lambda: self._wrong_state(path) if self.team.leads else [])
        if self.run is None or problems:
            return problems
        return self._of_several_saves(path) or (self._all(lambda: lacking(path, needed())) if needed else [])

    def _all(self, look: Callable[[], list[str]]) -> list[str]:
        """What the ranks have found together."""
        if not self.team.apart:
            return sorted(self.team.agree("verifying", look, joined))
        host = self._host(self.team.rank)
        return sorted(set(self.team.agree("verifying", lambda: [f"{host}: {problem}" for problem in look()], joined)))

    def _wrong_state(self, path: Path) -> list[str]:
        state = _or_reason(read_state, path)
        if isinstance(state, str):
            return [state]
        if self.run is None:
            return []
        mark = _mark(path)
        if mark is None or mark.run != self.run:
            return [f"it is of another run, {mark.run if mark is not None else 'which it does not name'}"]
        return []

    def _of_several_saves(self, path: Path) -> list[str]:
        marks = self.team.of_leaders("verifying", lambda: _mark(path))
        saves = {mark.save for mark in marks if mark is not None}
        return ["the nodes have parts of different saves of this step"] if len(saves) > 1 else []


def newest_verified(
    tiers: Sequence[CheckpointTier], needed: Needed | None = None
) -> tuple[CheckpointTier, Path] | None:
    """The checkpoint that `latest` means, in the first of the tiers that has it.

    Args:
        tiers: the first one is what all ranks see.
        needed: what this rank is to read of it.

    Returns:
        None: there is none.

    Raises:
        UserError: there are some in the first tier, and all are damaged.
    """
    shared = tiers[0]
    found = [(finite, step, -n) for n, tier in enumerate(tiers) for step, finite in tier.candidates.items()]
    for finite, step, number in sorted(found, reverse=True):
        tier = tiers[-number]
        path = step_folder(tier.directory, step)
        problems = tier.problems(path, needed)
        if not problems:
            passed = max((other for other in found if finite and not other[0] and other[1] > step), default=None)
            if passed is not None:
                bad = step_folder(tiers[-passed[2]].directory, passed[1])
                tier.telling.say(
                    f"{bad} holds NaN or infinite values; going on from {path}, unless checkpoint.resume names it"
                )
            return tier, path
        reason = "; ".join(problems)
        tier.telling.event("checkpoint_damaged", path=str(path), reason=reason)
        wrong = "is damaged" if tier.run is None else "cannot be used"
        tier.telling.say(f"{path} {wrong}, using the one before: {reason}")
    if shared.candidates:
        raise UserError(all_damaged(shared.directory, len(shared.candidates)))
    return None


def expect_there(team: Team, path: Path, key: str) -> None:
    """Raises UserError, on all ranks, where there is no checkpoint."""

    def look() -> None:
        problem = missing(path, key)
        if problem is not None:
            raise UserError(problem)

    team.first("verifying", look)


def verified_state(team: Team, path: Path) -> dict[str, Any]:
    """The state of a checkpoint.

    Raises:
        UserError: it is damaged.
    """
    found = team.first("reading the state", lambda: _or_reason(read_state, path))
    if isinstance(found, str):
        raise UserError(Problem(str(path), f"damaged checkpoint: {found}"))
    return found


def _mark(path: Path) -> LocalMark | None:
    try:
        return LocalMark.of(read_state(path))
    except (Damaged, JsonError):
        return None


def _or_reason(read: Callable[[Path], T], path: Path) -> T | str:
    try:
        return read(path)
    except Damaged as error:
        return str(error)
