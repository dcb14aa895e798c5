"""The way between the watchers of a job's nodes: lines of JSON over TCP, all to the deciding node's and back.

Its address and a token reach the others through the job's store, by way of the ranks that ask for the watchers; from
then on no rank is needed. A node whose connection breaks without a word is lost, and so are its ranks.

    member → home   {"hello": TOKEN, "host": …, "node": …, "port": …, "ranks": [4]}   {"trouble": impatient}
                    {"stands": […], "user": …}   {"blame": {…}}   {"gone": epoch}   {"spares": [ended], "ready": […], …}
    home → member   {"ask": with stacks}   {"verdict": {…}}   {"state": {…}}   {"fork": number}   {"leave": epoch}
                    {"prepare": {…}}   {"publish": epoch}   {"missed": [numbers]}
    both            {"beat": true}   {"bye": true}
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ....configs.strict_json import JsonError, expect_int, expect_list, expect_object, expect_text, parse_json

_MOST_BYTES, _MOST_OF_STRANGERS = 64 << 20, 1 << 16
"""Of a message; of one from somebody who has not shown the token."""
_PART = 1 << 16
_CALL_S = 5.0
"""For a watcher to answer a call, and to take what it is told."""


@dataclass(frozen=True)
class Introduction:
    """What a watcher says of its node.

    Args:
        host: for words.
        node: its name, unlike all others.
        port: at which its watcher listens; 0: at none.
        ranks: the slots that it has.
    """

    host: str
    node: str = ""
    port: int = 0
    ranks: tuple[int, ...] = ()


@dataclass(eq=False)
class End:
    """One end of a connection.

    Args:
        connection: its socket.
        about: the node at the other end, once it has said so.
        known: whether it has shown the token.
        over: it has said that it ends.
    """

    connection: socket.socket
    about: Introduction = field(default_factory=lambda: Introduction(""))
    known: bool = False
    over: bool = False
    heard: float = field(default_factory=time.monotonic)
    _buffer: bytes = field(default=b"", repr=False)

    def send(self, **message: Any) -> None:
        """Says something; what cannot be said shows as a broken connection soon."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> Iterator[dict[str, Any]]:
        """The messages that have come.

        Raises:
            ConnectionError: the other end is gone, or says what no watcher says.
        """
        try:
            part = self.connection.recv(_PART)
        except OSError as error:
            raise ConnectionError(str(error)) from error
        if not part or len(self._buffer) > (_MOST_BYTES if self.known else _MOST_OF_STRANGERS):
            raise ConnectionError("closed")
        self.heard = time.monotonic()
        *lines, self._buffer = (self._buffer + part).split(b"\n")
        for line in lines:
            try:
                yield expect_object(parse_json(line), "a message")
            except JsonError as error:
                raise ConnectionError(str(error)) from error

    @property
    def address(self) -> str:
        """Of the host at the other end."""
        try:
            return self.connection.getpeername()[0]
        except OSError:
            return ""


class WatchLink:
    """The connections of one node's watcher.

    Args:
        token: that all watchers of the job know.
        listener: where others call; None: nobody does.
        home: address of the deciding watcher; None: it is this one.
        about: this node.

    Raises:
        OSError: home cannot be reached.
    """

    def __init__(
        self, token: str, *, listener: socket.socket | None, home: tuple[str, int] | None, about: Introduction
    ) -> None:
        self._token, self.listener, self.about = token, listener, about
        self.home: End | None = None
        """The way to the deciding watcher; None: it is this one."""
        self.members: list[End] = []
        """Those who have called."""
        self.lost: list[End] = []
        """Nodes whose connection broke without a word, for whoever looks to take."""
        if home is not None:
            self.call(home)

    @property
    def is_home(self) -> bool:
        return self.home is None

    def call(self, home: tuple[str, int]) -> None:
        """Takes another watcher for the deciding one.

        Raises:
            OSError: it cannot be reached.
        """
        self.home = End(socket.create_connection(home, timeout=_CALL_S), known=True)
        self.home.send(hello=self._token, **vars(self.about))

    def sockets(self) -> list[socket.socket]:
        """What to wait for."""
        return [*(end.connection for end in self._ends()), *([self.listener] if self.listener is not None else [])]

    def _ends(self) -> list[End]:
        known = [*([self.home] if self.home is not None else []), *self.members]
        return [end for end in known if end.connection.fileno() >= 0]

    def read(self, ready: set[int]) -> Iterator[tuple[End, dict[str, Any]]]:
        """The messages behind the descriptors that are ready."""
        if self.listener is not None and self.listener.fileno() in ready:
            connection, _ = self.listener.accept()
            connection.settimeout(_CALL_S)
            self.members.append(End(connection))
        for end in [end for end in self._ends() if end.connection.fileno() in ready]:
            try:
                for message in end.read():
                    if end.known:
                        end.over = end.over or "bye" in message
                        yield end, message
                    elif not self._welcome(end, message):
                        raise ConnectionError("a stranger")
                    else:
                        yield end, message
            except ConnectionError:
                self.drop(end)

    def drop(self, end: End) -> None:
        """Ends a connection; its node is lost, if it has not said goodbye."""
        end.connection.close()
        if end in self.members:
            self.members.remove(end)
        if end.known and not end.over:
            self.lost.append(end)

    def silent(self, seconds: float) -> list[End]:
        """Those who have said nothing for so long."""
        now = time.monotonic()
        return [end for end in self._ends() if end.known and now - end.heard > seconds]

    def excuse(self, seconds: float) -> None:
        """Does not count a time in which this process heard nobody."""
        for end in self._ends():
            end.heard += seconds

    def _welcome(self, end: End, message: dict[str, Any]) -> bool:
        with contextlib.suppress(JsonError):
            known = expect_object(message, "a greeting", ("hello", "host", "node", "port", "ranks"))
            if hmac.compare_digest(expect_text(known["hello"], "hello").encode(), self._token.encode()):
                end.about = Introduction(
                    expect_text(known["host"], "host"),
                    expect_text(known["node"], "node"),
                    expect_int(known["port"], "port", 0, 65535),
                    tuple(expect_int(rank, "a rank") for rank in expect_list(known["ranks"], "ranks")),
                )
                end.known = True
        return end.known

    def tell(self, **message: Any) -> None:
        """Says something to all that this watcher decides for, or to the one that decides."""
        for end in [self.home] if self.home is not None else self.members:
            if end.known:
                end.send(**message)

    def close(self) -> None:
        """Says goodbye."""
        for end in self._ends():
            if end.known:
                end.send(bye=True)
        for connection in self.sockets():
            connection.close()
