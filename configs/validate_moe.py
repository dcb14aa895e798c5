"""Checks of `model.moe`, latent attention and the expert mesh `parallel.etp · ep · edp`."""

from __future__ import annotations

from .errors import Problem
from .schema import Config


def validate_moe(config: Config) -> list[Problem]:
    """Every problem of the resolved sections that follows from the values alone."""
    return [*_mesh(config)]


def _mesh(config: Config) -> list[Problem]:
    p, experts = config.parallel, config.model.moe.experts
    inner = p.ep * p.etp
    if inner <= 1:
        return []
    if not experts:
        key = "parallel.ep" if p.ep > 1 else "parallel.etp"
        message = (
            f"parallel.ep={p.ep} and parallel.etp={p.etp} split experts, and model.moe.experts=0 has none; "
            "set parallel.ep=1 and parallel.etp=1, or model.moe.experts"
        )
        return [Problem(key, message)]
    problems: list[Problem] = []
    if p.dp is not None:
        ranks = p.tp * p.cp * p.dp
        if ranks % inner:
            message = (
                f"parallel.ep={p.ep} x parallel.etp={p.etp} = {inner} does not divide parallel.tp={p.tp} x "
                f"parallel.cp={p.cp} x parallel.dp={p.dp} = {ranks}, the ranks of a pipeline stage; set parallel.ep "
                "and parallel.etp so that their product divides them"
            )
            problems.append(Problem("parallel.ep", message))
    return problems
