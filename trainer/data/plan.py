"""What a run will see of its data, in numbers and in words for its console."""

from __future__ import annotations

from dataclasses import dataclass

from .dataset import Dataset
from .loader import heldout_steps


@dataclass(frozen=True)
class DataPlan:
    """A run's share of its data.

    `sequences` are those to train on, `drawn` those that all steps take together. `epochs` is how often the
    source that comes round most is gone through, `source` its name where there are several. `heldout` sequences
    are held out; an evaluation takes `eval_steps` steps of them, `eval_asked` were configured (0: no evaluation).
    """

    tokens: int
    documents: int
    sequences: int
    drawn: int
    epochs: float
    source: str
    heldout: int
    eval_asked: int
    eval_steps: int
    global_batch: int


def plan_data(data: Dataset, *, steps: int, global_batch: int, eval_steps: int) -> DataPlan:
    """The plan of a run of `steps` steps, whose evaluations ask for `eval_steps` steps (0: there are none)."""
    sampler, drawn = data.train.sampler, steps * global_batch
    turns = sampler.pattern.turns(drawn)
    epochs = [
        int(taken) / (total - held) for taken, total, held in zip(turns, sampler.windows, sampler.heldout, strict=True)
    ]
    most = max(range(len(epochs)), key=epochs.__getitem__)
    held = data.heldout
    return DataPlan(
        tokens=data.tokens,
        documents=data.documents,
        sequences=data.train.sequences,
        drawn=drawn,
        epochs=epochs[most],
        source=data.sources[most] if len(epochs) > 1 else "",
        heldout=held.sequences if held is not None else 0,
        eval_asked=eval_steps,
        eval_steps=heldout_steps(held, eval_steps, global_batch) if held is not None and eval_steps else 0,
        global_batch=global_batch,
    )


def describe_data(plan: DataPlan) -> list[str]:
    """The plan in lines: what is trained on, what is held out, and what falls short of the configuration."""
    of = f" of {plan.source}" if plan.source else ""
    lines = [
        f"training on {plan.sequences:,} sequences of {plan.documents:,} documents, "
        f"{plan.drawn:,} drawn: {plan.epochs:.3g} epochs{of}"
    ]
    if plan.heldout:
        used = min(plan.eval_steps * plan.global_batch, plan.heldout)
        lines.append(
            f"held out: {plan.heldout:,} sequences"
            + (f", an evaluation takes {used:,} of them in {plan.eval_steps} steps" if plan.eval_steps else "")
        )
    if plan.eval_steps < plan.eval_asked:
        lines.append(
            f"warning: eval.steps={plan.eval_asked}, but {plan.heldout:,} held-out sequences fill only "
            f"{plan.eval_steps} steps of {plan.global_batch}; raise data.holdout for more"
        )
    if plan.sequences < plan.global_batch:
        lines.append(
            f"warning: a step takes {plan.global_batch} sequences, but there are only {plan.sequences} to train on, "
            "so it holds some of them twice; lower train.global_batch or train.seq_len, or give more data"
        )
    return lines
