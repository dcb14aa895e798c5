"""What a job wants to know of its devices before it trains on them."""

from __future__ import annotations

from ..metrics.probe import probe, probe_lines
from ..metrics.rows import RowExchange
from ..metrics.sinks import EventLog
from ..numerics.canary import canary, canary_lines, raise_if_wrong
from ..session import Session
from ..setup import DTYPES


def try_out(session: Session, rows: RowExchange, events: EventLog | None) -> None:
    """What the job wants to know of its devices before it trains on them."""
    faults = session.cfg.faults
    if faults.numerics.canary:
        _canary(session, events)
    if faults.probe_at_start:
        _probe(session, rows, events)


def _probe(session: Session, rows: RowExchange, events: EventLog | None) -> None:
    """Tries out products and links; the first rank says what was found."""
    found = probe(session.mesh, session.device, DTYPES[session.cfg.train.dtype], rows.hosts)
    if events is not None:
        print("\n".join(probe_lines(found)), flush=True)
        events.log("probe", **found.event)


def _canary(session: Session, events: EventLog | None) -> None:
    """Ends the job if a rank computes other bits than the others."""
    found = canary(session.mesh, session.device, DTYPES[session.cfg.train.dtype])
    if events is not None:
        events.log("canary", kinds=found.kinds, suspects=list(found.suspects), found=list(found.lines))
    raise_if_wrong(found)
    if events is not None:
        print("\n".join(canary_lines(found)), flush=True)
