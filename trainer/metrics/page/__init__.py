"""`report.html`: runs as one page that opens offline, from the files of their folders. No torch here."""

from .write import write_page

__all__ = ["write_page"]
