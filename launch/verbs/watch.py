"""`pentad watch RUN`: a live view of a job in a terminal, from its ranks' rings and its files. Imports no torch.

Nothing is asked of the job and nothing is written: it may be healthy, hang, be stopped, or have ended.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

_PERIOD_S = 0.5


def watch_parser(parser: argparse.ArgumentParser) -> None:
    """Describes the verb's arguments."""
    parser.description = (
        "A live view of a run: its ranks by their place in the mesh, coloured by what they are at, the open operation "
        "of the rank under the cursor, the last step, events. Arrows move the cursor, q quits. Without a terminal, or "
        "with --once, one look as text."
    )
    parser.add_argument("folder", metavar="RUN", help="the run's folder, or its name in runs/")
    parser.add_argument("--once", action="store_true", help="print one look and end")
    parser.set_defaults(run=watch_run)


def watch_run(args: argparse.Namespace) -> int:
    """Shows the run until somebody types q.

    Raises:
        UserError: there is no such run, or it has no record.
    """
    from .report import folder_of
    from .watch_screen import plain_text, screen_lines
    from .watch_state import JobReader

    reader = JobReader(folder_of(args.folder))
    try:
        terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        if args.once or not terminal:
            print(plain_text(screen_lines(reader.look(), 0)))
            return 0
        import curses

        curses.wrapper(_Screen(reader).show)
    finally:
        reader.close()
    return 0


class _Screen:
    """The view in a terminal."""

    def __init__(self, reader: Any) -> None:
        self._reader, self._cursor = reader, 0
        self._look: dict[str, int] = {}

    def show(self, window: Any) -> None:
        """Draws, and waits for a key or for the next look."""
        import curses

        from .watch_screen import columns_of, screen_lines

        curses.curs_set(0)
        self._colours()
        window.timeout(int(1000 * _PERIOD_S))
        while True:
            view = self._reader.look()
            window.erase()
            height, width = window.getmaxyx()
            for y, line in enumerate(screen_lines(view, self._cursor, width)[: height - 1]):
                self._line(window, y, line, width)
            footer = "arrows: another rank   q: quit"
            window.addnstr(height - 1, 0, footer, width - 1, curses.A_DIM)
            window.refresh()
            key = window.getch()
            if key in (ord("q"), ord("Q"), 27):
                return
            across = columns_of(view)
            moves = {curses.KEY_LEFT: -1, curses.KEY_RIGHT: 1, curses.KEY_UP: -across, curses.KEY_DOWN: across}
            moved = self._cursor + moves.get(key, 0)
            self._cursor = moved if 0 <= moved < view.world else min(self._cursor, max(view.world - 1, 0))

    def _line(self, window: Any, y: int, line: Any, width: int) -> None:
        x = 0
        for text, colour in line:
            if x >= width - 1:
                return
            window.addnstr(y, x, text, width - 1 - x, self._look.get(colour, 0))
            x += len(text)

    def _colours(self) -> None:
        import curses

        self._look = {"bold": curses.A_BOLD, "grey": curses.A_DIM}
        if not curses.has_colors() or os.environ.get("NO_COLOR"):
            self._look |= {"red": curses.A_REVERSE}
            return
        curses.start_color()
        curses.use_default_colors()
        for number, name in enumerate(("green", "blue", "cyan", "magenta", "yellow", "red"), 1):
            curses.init_pair(number, getattr(curses, f"COLOR_{name.upper()}"), -1)
            self._look[name] = curses.color_pair(number) | (curses.A_BOLD if name == "red" else 0)
