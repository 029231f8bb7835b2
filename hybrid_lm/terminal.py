"""Where tables, bars and lines go."""

from __future__ import annotations

from rich.console import Console


class Terminal(Console):
    """A console whose reader may go away: `hybrid-lm train ... | head` ends the lines and not the work."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
