"""The way between the watchers of a job's nodes: lines of JSON over TCP, all to the first node's and back.

Its address and a token reach the others through the job's store, by way of the ranks that ask for the watchers; from
then on no rank is needed. A node whose connection breaks without a word is lost, and so are its ranks.

    member → home   {"hello": TOKEN, "host": …, "ranks": [4]}   {"trouble": impatient}   {"stands": […]}   {"bye": true}
    home → member   {"ask": with stacks}   {"verdict": {…}}   {"bye": true}
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ...configs.strict_json import JsonError, expect_int, expect_list, expect_object, expect_text, parse_json

_MOST_BYTES, _MOST_OF_STRANGERS = 64 << 20, 1 << 16
"""Of a message; of one from somebody who has not shown the token."""
_PART = 1 << 16


@dataclass(eq=False)
class End:
    """One end of a connection.

    Args:
        connection: its socket.
        host, ranks: of the node at the other end, once it has said so.
        known: whether it has shown the token.
        over: it has said that it ends.
    """

    connection: socket.socket
    host: str = ""
    ranks: tuple[int, ...] = ()
    known: bool = False
    over: bool = False
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
        *lines, self._buffer = (self._buffer + part).split(b"\n")
        for line in lines:
            try:
                yield expect_object(parse_json(line), "a message")
            except JsonError as error:
                raise ConnectionError(str(error)) from error


class WatchLink:
    """The connections of one node's watcher.

    Args:
        token: that all watchers of the job know.
        listener: of the first node's; None elsewhere.
        home: address of the first node's watcher, elsewhere.
        host, ranks: of this node.

    Raises:
        OSError: home cannot be reached.
    """

    def __init__(
        self, token: str, *, listener: socket.socket | None, home: tuple[str, int] | None, host: str, ranks: list[int]
    ) -> None:
        self._token, self.listener = token, listener
        self.ends: list[End] = []
        self.lost: list[End] = []
        """Nodes whose connection broke without a word."""
        if home is not None:
            end = End(socket.create_connection(home, timeout=30), known=True)
            self.ends.append(end)
            end.send(hello=token, host=host, ranks=ranks)

    @property
    def is_home(self) -> bool:
        return self.listener is not None

    def sockets(self) -> list[socket.socket]:
        """What to wait for."""
        return [*(end.connection for end in self.ends), *([self.listener] if self.listener is not None else [])]

    def read(self, ready: set[int]) -> Iterator[tuple[End, dict[str, Any]]]:
        """The messages behind the descriptors that are ready."""
        if self.listener is not None and self.listener.fileno() in ready:
            connection, _ = self.listener.accept()
            connection.settimeout(5)
            self.ends.append(End(connection))
        for end in [end for end in self.ends if end.connection.fileno() in ready]:
            try:
                for message in end.read():
                    if end.known:
                        end.over = end.over or "bye" in message
                        yield end, message
                    elif not self._welcome(end, message):
                        raise ConnectionError("a stranger")
            except ConnectionError:
                end.connection.close()
                self.ends.remove(end)
                if end.known and not end.over:
                    self.lost.append(end)

    def _welcome(self, end: End, message: dict[str, Any]) -> bool:
        with contextlib.suppress(JsonError):
            known = expect_object(message, "a greeting", ("hello", "host", "ranks"))
            if hmac.compare_digest(expect_text(known["hello"], "hello").encode(), self._token.encode()):
                end.host = expect_text(known["host"], "host")
                end.ranks = tuple(expect_int(rank, "a rank") for rank in expect_list(known["ranks"], "ranks"))
                end.known = True
        return end.known

    def tell(self, **message: Any) -> None:
        """Says something to all others."""
        for end in self.ends:
            if end.known:
                end.send(**message)

    def close(self) -> None:
        """Says goodbye."""
        self.tell(bye=True)
        for connection in self.sockets():
            connection.close()
