"""What an evaluation reports, after the step that it follows on."""

from __future__ import annotations

from .metric import Metric

HELD_OUT_LOSS = Metric(
    "loss_val",
    "mean over all valid tokens of the evaluation, after the step",
    unit="nats",
    in_file=False,
    tracker="loss/val",
    over="progress/tokens",
    line=lambda step, loss: f"held-out loss after step {step}: {loss:.4f}",
)


def sample_metric(number: int) -> Metric:
    """Of the `number`th of `eval.prompts`, from 0."""
    return Metric(
        f"sample_{number}",
        "the prompt and what the model makes of it, on one line",
        in_file=False,
        tracker=f"samples/{number}",
        line=lambda step, text: f"sample: {text}",
    )


def on_one_line(prompt: str, text: str) -> str:
    """A prompt and what the model makes of it."""
    return f"{prompt} … {text}".replace("\n", "\\n")
