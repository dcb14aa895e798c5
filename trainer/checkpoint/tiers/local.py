"""Checkpoints that each node keeps of its own ranks: whose they are, and where. No torch here.

    checkpoint.local.dir/RUN/HOST/step-00000010/    what the ranks of this host hold, each element of it once

They outlive the processes and not the node, so that a run believes only those that it has made itself: RUN is a random
number in the run's folder, which every such checkpoint names too.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....configs.errors import Problem, UserError
from ....configs.strict_json import JsonError, expect_list, expect_object, expect_text, read_bytes

LOCAL = "local"
"""In a state: of which run and which save a part is, and of which hosts."""
_RUN = re.compile(r"[0-9a-f]{32}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_HOST_CHARACTERS = 200


@dataclass(frozen=True)
class NodeFolders:
    """The folders that the nodes of a job have for themselves.

    Args:
        run: the job's run.
        hosts: where each rank is.
    """

    run: str
    hosts: tuple[str, ...]

    def folder(self, directory: Path, rank: int) -> Path:
        """Of the host of a rank."""
        return directory / self.run / _UNSAFE.sub("_", self.hosts[rank])[:_HOST_CHARACTERS]

    def mark(self, save: str) -> dict[str, Any]:
        """What the parts of one save say in their states."""
        return {LOCAL: {"run": self.run, "save": save, "hosts": sorted(set(self.hosts))}}


@dataclass(frozen=True)
class LocalMark:
    """What a part says of itself.

    Args:
        run, save: it belongs to.
        hosts: that have the other parts of the same save, and this one.
    """

    run: str
    save: str
    hosts: tuple[str, ...]

    @staticmethod
    def of(state: dict[str, Any]) -> LocalMark | None:
        """None where it is a checkpoint that all ranks see.

        Raises:
            JsonError: it says something else.
        """
        if LOCAL not in state:
            return None
        found = expect_object(state[LOCAL], LOCAL, ("run", "save", "hosts"))
        hosts = tuple(expect_text(host, "a host") for host in expect_list(found["hosts"], "hosts"))
        return LocalMark(expect_text(found["run"], "run"), expect_text(found["save"], "save"), hosts)


def run_number(file: Path, *, makes: bool = True) -> str | None:
    """The number of a run that no other one has.

    Args:
        file: in the run's folder.
        makes: one, where there is none.

    Raises:
        UserError: the file holds something else, or cannot be read or written.
    """
    try:
        number = read_bytes(file, max_bytes=1 << 10).decode("ascii", "replace").strip()
    except FileNotFoundError:
        if not makes:
            return None
        number = secrets.token_hex(16)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".{file.name}.partial")
            partial.write_text(f"{number}\n")
            os.replace(partial, file)
        except OSError as error:
            raise UserError(Problem("runs_dir", f"{file} cannot be written ({error.strerror}); set runs_dir")) from None
    except (OSError, JsonError) as error:
        raise UserError(Problem("checkpoint.local.dir", f"{file} cannot be read ({error}); remove it")) from None
    if not _RUN.fullmatch(number):
        raise UserError(Problem("checkpoint.local.dir", f"{file} holds no run's number; remove it"))
    return number


def make_own(folder: Path) -> None:
    """Makes HOST and RUN, which nobody else may enter, in a folder that others may share.

    Raises:
        PermissionError: somebody else has made one of them.
        OSError: one cannot be made.
    """
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, exist_ok=True)
        _expect_own(each)


def foreign(folder: Path) -> str | None:
    """Why nothing in a folder is believed; none: it is this user's, or not there."""
    try:
        for each in (folder.parent, folder):
            _expect_own(each)
    except FileNotFoundError:
        return None
    except OSError as error:
        return str(error.strerror or error)
    return None


def _expect_own(folder: Path) -> None:
    if folder.is_symlink() or folder.lstat().st_uid != os.geteuid():
        raise PermissionError(1, f"{folder} is another user's, or a link")


def host_words(hosts: Sequence[str]) -> str:
    """Hosts in words."""
    return f"{', '.join(hosts[:4])}{f' and {len(hosts) - 4} more' if len(hosts) > 4 else ''}"
