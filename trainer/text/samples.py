"""Text from a model in training, in the layout of the run: through its evaluation program.

No layout is known here. A batch of prompts goes through the program like held-out text, with a label (the prompt's
number) at each prompt's last token alone; wherever a head makes logits for a token with a label, it shows them, and
that rank notes the likeliest of its rows. Then all ranks compare notes. The whole text is read again for each token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...configs.schema import Config
from ...parallel.comm.collectives import all_gather
from ...parallel.comm.mesh import Mesh
from ...parallel.labels import IGNORED
from ...parallel.vocab import VocabShard
from ..data.dataset import Microbatch
from ..pipeline.programs import Pipeline, evaluation_program
from ..step import Stepper
from .prompts import PromptCoder


@dataclass(frozen=True)
class Sample:
    """A prompt and the likeliest text after it."""

    prompt: str
    text: str
    tokens: tuple[int, ...]


class PromptSampler:
    """Continues prompts greedily. Every rank makes one and calls it at the same time.

    Args:
        cfg: the job.
        mesh, pipeline, stepper: its parts on this rank.
        coder: its tokenizer.
        stops: token ids that end a text.
    """

    def __init__(
        self, cfg: Config, mesh: Mesh, pipeline: Pipeline, stepper: Stepper, coder: PromptCoder, stops: Collection[int]
    ) -> None:
        self._cfg, self._mesh, self._stepper, self._coder, self._stops = cfg, mesh, stepper, coder, frozenset(stops)
        self._program = evaluation_program(cfg, pipeline, 1)
        self._world, self._device = mesh.axis("world"), stepper.device

    def __call__(self, prompts: Sequence[str], count: int) -> list[Sample]:
        """Each prompt with at most `count` tokens after it, fewer where it ends or fills train.seq_len."""
        texts = [self._coder.encode(prompt) for prompt in prompts]
        room = self._cfg.train.micro_batch * self._mesh.axis("dp").size
        found: list[list[int]] = []
        for first in range(0, len(texts), room):
            found += self._continued(texts[first : first + room], count)
        return [
            Sample(prompt, self._after(text, tokens), tuple(tokens))
            for prompt, text, tokens in zip(prompts, texts, found, strict=True)
        ]

    def _after(self, prompt: list[int], tokens: list[int]) -> str:
        kept = [token for token in tokens if token not in self._stops]
        return self._coder.decode(prompt + kept)[len(self._coder.decode(prompt)) :]

    def _continued(self, texts: list[list[int]], count: int) -> list[list[int]]:
        """What follows as many texts as one pass has room for."""
        texts, made = [list(text) for text in texts], [list[int]() for _ in texts]
        for _ in range(count):
            open_ones = [
                i
                for i, text in enumerate(texts)
                if len(text) < self._cfg.train.seq_len and not (made[i] and made[i][-1] in self._stops)
            ]
            if not open_ones:
                break
            for i, token in zip(open_ones, self._next([texts[i] for i in open_ones]), strict=True):
                texts[i].append(token)
                made[i].append(token)
        return made

    def _next(self, texts: list[list[int]]) -> list[int]:
        """The likeliest token after each text."""
        train, dp = self._cfg.train, self._mesh.axis("dp")
        tokens = torch.zeros((train.micro_batch, train.seq_len), dtype=torch.long)
        labels = torch.full_like(tokens, IGNORED)
        for number in range(dp.rank, len(texts), dp.size):
            text, row = texts[number], number // dp.size
            tokens[row, : len(text)] = torch.tensor(text)
            labels[row, len(text) - 1] = number
        samples = torch.arange(train.micro_batch)
        notes = _Notes(len(texts))
        self._stepper.evaluate(
            [Microbatch(tokens, labels, None, None, samples, int((labels >= 0).sum()), 0.0)], self._program, notes.look
        )
        everyone = all_gather(notes.best.to(self._device), self._world).wait().view(self._world.size, len(texts), 2)
        scores, ids = everyone.cpu().unbind(-1)
        # Of equal scores the smallest id, wherever it is kept.
        return torch.where(scores == scores.amax(0), ids, torch.inf).amin(0).long().tolist()


class _Notes:
    """The likeliest of this rank's rows after each text: (texts, 2) score and token id, in fp64."""

    def __init__(self, texts: int) -> None:
        self.best = torch.tensor([[-torch.inf, torch.inf]], dtype=torch.float64).repeat(texts, 1)

    def look(self, logits: Tensor, labels: Tensor, shard: VocabShard) -> None:
        """A `parallel.vocab.Look`."""
        rows = (labels >= 0).nonzero().squeeze(1)
        if len(rows):
            chosen = logits[rows].double()
            ids = chosen.argmax(-1)
            scores = chosen.gather(1, ids[:, None]).squeeze(1)
            self.best[labels[rows].cpu()] = torch.stack((scores, (ids + shard.start).double()), -1).cpu()
