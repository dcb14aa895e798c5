"""The page of runs as a test reads it: what a parser of HTML finds, and the numbers that the charts are drawn from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


@dataclass
class ReadPage(HTMLParser):
    """Args: tags: how often each tag opens; texts: of the scripts, in their order; addresses: that it points to."""

    tags: dict[str, int] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    handlers: list[str] = field(default_factory=list)
    _script: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self._script = tag == "script"
        if self._script:
            self.texts.append("")
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "srcset", "poster"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        if self._script:
            self.texts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    @property
    def content(self) -> dict[str, Any]:
        """What the page's script reads."""
        return json.loads(self.texts[0])


def read_page(text: str | Path) -> ReadPage:
    """Parses a page, or its file."""
    read = ReadPage()
    read.feed(text.read_text() if isinstance(text, Path) else text)
    read.close()
    return read
