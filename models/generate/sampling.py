"""From logits to the next token, and to the tokens after it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .decode import SequenceReader


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0: the token of the largest logit (the first of equal ones); else the logits are divided by it and
            a token is drawn.
        top_p: drawn from the fewest tokens whose probabilities sum to at least this (nucleus sampling, arXiv
            1904.09751, section 3.1).
        seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class TokenSampler:
    """Chooses one token after the other."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._draws = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """A token id from logits (V,)."""
        s = self._sampling
        if s.temperature == 0:
            return int(logits.argmax())
        # In fp64 on the host, so that a seed gives the same tokens on every device.
        probabilities = torch.softmax(logits.double().cpu() / s.temperature, -1)
        ordered, ids = probabilities.sort(descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < s.top_p
        kept[0] = True
        ordered = ordered.masked_fill(~kept, 0.0)
        return int(ids[torch.multinomial(ordered, 1, generator=self._draws)])


def generate_tokens(
    reader: SequenceReader,
    prompt: Sequence[int],
    *,
    count: int,
    sampling: Sampling = Sampling(),
    stop: Collection[int] = (),
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """The tokens that follow a prompt, each as soon as it is known; the last one may be one of `stop`.

    Args:
        reader: new.
        prompt: at least one token id.
        count: most tokens.
        sampling: how each is chosen.
        stop: token ids after which nothing follows.
        device: the model's.
    """
    sampler = TokenSampler(sampling)
    piece = list(prompt)
    for _ in range(count):
        token = sampler(reader(torch.tensor([piece], device=device)))
        yield token
        if token in stop:
            return
        piece = [token]
