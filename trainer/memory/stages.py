"""What a stage holds of one microbatch, and the most that is alive while its passes go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...configs import Config
from ...configs.tables.context_methods import CONTEXT_METHODS
from ...models.costs.activations import angle_rows, begin_rows, end_rows, prediction_rows
from ...models.costs.kept import Choice, kept_bytes
from ...models.costs.moments.layer import LayerBytes, layer_bytes
from ...models.costs.moments.projections import norm_backward
from ...models.costs.moments.tape import Tape
from ...models.costs.moments.ways import CPU, CUDA, Bench, Ways
from ...models.costs.tensors import Group
from ...models.costs.widths import LocalWork
from ..devices.visible import visible_gpus
from .fixed import WIDTHS

HEAD_CHUNK = 1024
"""Tokens whose logits the head holds at once (`parallel.vocab.VocabHead`)."""

Routed = Mapping[tuple[int, int], tuple[int, int]]
"""(layer, microbatch) → rows that the experts of a rank got, and rows that its tokens sent."""


def ways_of(cfg: Config) -> Ways:
    """How the job's devices compute. train.device=auto: GPUs where one is described or there."""
    if cfg.train.device == "cpu":
        return CPU
    described = cfg.hardware.preset is not None
    return CUDA if cfg.train.device == "cuda" or described or visible_gpus() else CPU


def bench_of(cfg: Config, ways: Ways) -> Bench:
    """A microbatch of the job as one rank works on it."""
    p, t = cfg.parallel, cfg.train
    method = CONTEXT_METHODS[p.context.method]
    exchanged = {"cp": p.cp, "inner": p.context.inner or 1, None: 1}[method.exchanges] if p.cp > 1 else 1
    work = LocalWork(
        sequences=t.micro_batch,
        tokens=t.micro_batch * t.seq_len // p.cp,
        width=WIDTHS[t.dtype],
        tp=p.tp,
        etp=p.etp,
        ranks=p.ep * p.etp,
        exchanged=exchanged,
        latents=p.cp > 1 and bool(method.latent_core),
        by_head=bool(ways.long)
        and p.cp == 1
        and t.seq_len >= ways.long
        and not (cfg.model.mla.kv_rank or cfg.model.window),
    )
    return Bench(model=cfg.model, work=work, ways=ways, method=p.context.method if p.cp > 1 else "", ranks=p.cp)


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """What another code needs in place of ours, as it was published: then layers are not gone through.

    Args:
        parameter: bytes of a parameter with its gradient, master and states.
        layer: bytes that a layer keeps for each token and hidden feature.
        logits: bytes that the last stage's head makes for each token and word.
        shard: the same of a balanced vocabulary, for each token and word of a rank, from S to T.
        rows: bytes that S and T make for each token and hidden feature.
        embedded: bytes that every rank keeps for each token and hidden feature from IF to IB.
    """

    parameter: float
    layer: float
    logits: float
    shard: float
    rows: float
    embedded: float

    def stage(self, b: Bench, place: StagePlace) -> StageBytes:
        """What a stage holds of one microbatch."""
        hidden = b.work.tokens * b.model.hidden
        kept = len(place.layers) * self.layer * hidden / b.work.tp
        head = self.logits * b.work.tokens * b.model.vocab / b.work.tp if place.last and not place.balanced else 0.0
        return StageBytes(
            kept=kept,
            forward=kept + head,
            ends=(((), kept + head),),
            deferred=kept,
            weight=0.0,
        )

    def vocabulary(self, b: Bench, ranks: int) -> VocabularyBytes:
        """What a balanced vocabulary holds of one microbatch."""
        shard = self.shard * b.work.tokens * b.model.vocab / b.work.tp / ranks
        hidden = b.work.tokens * b.model.hidden
        return VocabularyBytes(
            kept=shard, score=self.rows * hidden, gradient=self.rows * hidden, embedded=self.embedded * hidden
        )


@dataclass(frozen=True)
class VocabularyBytes:
    """Of a balanced vocabulary, for one microbatch on one rank.

    Args:
        kept: from S to T.
        score, gradient, embedding: what S, T, and IF or IB make beside.
        embedded: from IF to IB.
    """

    kept: float = 0.0
    score: float = 0.0
    gradient: float = 0.0
    embedding: float = 0.0
    embedded: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StageBytes:
    """Of one stage and one microbatch.

    Args:
        kept: from the forward to the backward pass.
        forward: the most that the forward pass adds to what was alive before it.
        ends: of each half of a layer in backward, from the last one on: the gradients that are final before it, and
            the most that is alive of the stage meanwhile; at the end those that are final after all of them.
        deferred: what is left after a split backward pass.
        weight: the most that the deferred part adds to it.
    """

    kept: float
    forward: float
    ends: tuple[tuple[tuple[Group, ...], float], ...]
    deferred: float
    weight: float


@dataclass(frozen=True, kw_only=True)
class StagePlace:
    """What a stage has to do with its neighbours.

    Args:
        layers: indices of its layers.
        first, last: of all stages.
        received, returned: its input, its output's gradient, comes into a buffer that is there all the time.
        balanced: embedding and head are elsewhere.
        split: weight gradients are left for later.
    """

    layers: tuple[int, ...]
    first: bool
    last: bool
    received: bool
    returned: bool
    balanced: bool
    split: bool


def stage_bytes(
    b: Bench, place: StagePlace, choice: Callable[[int], Choice], routed: Callable[[int], Bench]
) -> StageBytes:
    """What a stage holds.

    Args:
        b: model, microbatch and device.
        place: of the stage.
        choice: of a layer: what is made again.
        routed: of a layer: the same with its own rows of experts.
    """
    m, work = b.model, b.work
    ahead = tuple(range(m.layers, m.layers + m.mtp)) if place.last else ()
    each = [layer_bytes(routed(i), i, choice(i), split=place.split) for i in (*place.layers, *ahead)]
    begins = kept_bytes(begin_rows(m, work)) if place.first and not place.balanced else 0
    angles = kept_bytes(angle_rows(m, work, each=b.ranks > 1)) if each else 0
    given = b.stream if place.received and each else 0.0
    forward, now = 0.0, float(begins + angles)
    if place.first and not place.balanced:
        forward = max(forward, now + _embedding(b))
    for index, layer in enumerate(each):
        forward = max(forward, now + layer.forward - (given if index == 0 else 0.0))
        now += layer.kept - (given if index == 0 else 0.0)
    if not place.last:
        forward = max(forward, now + b.stream)
    base = now
    if place.last:
        for _ in ahead:
            now += kept_bytes(prediction_rows(m, work))
        end = kept_bytes(end_rows(m, work, head=not place.balanced))
        forward = max(forward, now + _head_forward(b, place))
        now += end
    kept = now
    ends = _backward(b, place, each, kept, base, given)
    deferred = sum(layer.deferred for layer in each)
    widest = max((b.product(b.w.ffn, m.hidden), b.product(b.w.expert, m.hidden)), default=0.0)
    return StageBytes(
        kept=kept,
        forward=forward,
        ends=tuple(ends),
        deferred=deferred,
        weight=2 * b.whole * (work.tp > 1) + widest,
    )


def _backward(
    b: Bench, place: StagePlace, each: Sequence[LayerBytes], kept: float, base: float, given: float
) -> list[tuple[tuple[Group, ...], float]]:
    """(gradients that are final, the most that is alive of the stage after that), from the last half of a layer on."""
    found: list[tuple[tuple[Group, ...], float]] = []
    final: list[Group] = []

    def look(most: float) -> None:
        found.append((tuple(final), most))
        final.clear()

    alive = kept
    if place.last:
        t = Tape({"all": kept})
        norm_backward(t, b, "", "d stream", b.stream)
        look(t.peak + (b.stream if b.work.tp > 1 else 0.0))
        final.append(("end", 0))
        alive = base
    returned = b.stream if place.returned else 0.0
    layers = [*place.layers, *range(b.model.layers, b.model.layers + len(each) - len(place.layers))]
    left = 0.0
    for position in reversed(range(len(each))):
        layer, index = each[position], layers[position]
        slots = (given if position == 0 else 0.0) + (returned if position == len(each) - 1 else 0.0)
        alive -= layer.kept - (given if position == 0 else 0.0)
        begin, ffn, attention = (alive + most + left - slots for most in layer.backward)
        look(begin)
        final.append(("down", index))
        look(ffn)
        final.append(("ffn", index))
        final.append(("out", index))
        look(attention)
        final.append(("attention", index))
        left += layer.deferred
    if place.first and not place.balanced:
        look(alive + left + _embedding_backward(b))
        final.append(("begin", 0))
    look(alive + left)
    return found


def _embedding(b: Bench) -> float:
    """Rows of the table; over tp of all tokens, masked, and their sum over the ranks."""
    if b.work.tp == 1:
        return b.stream
    return b.stream + 2 * b.whole + b.collected(b.whole)


def _embedding_backward(b: Bench) -> float:
    wide = b.wide(b.whole) if b.half else 0.0
    return b.stream + wide if b.work.tp == 1 else b.stream + 2 * b.whole + wide


def _head_forward(b: Bench, place: StagePlace) -> float:
    """The last norm's output, and of the head the gradient with the logits of one chunk of tokens."""
    m, work = b.model, b.work
    if place.balanced:
        return 2 * b.stream
    gathered = b.whole if work.tp > 1 else 0.0
    return 2 * b.stream + gathered + b.whole + logits_bytes(b, work.tokens, m.vocab // work.tp)


def logits_bytes(b: Bench, tokens: int, vocab: int, chunk: int = HEAD_CHUNK) -> float:
    """Bytes of what the head makes of one chunk: logits, exponentials that become their gradient, and the product of
    the weight's gradient. Of several chunks the last one's are let go when the next one's are there."""
    rows, several = min(tokens, chunk), tokens > chunk
    logits = rows * vocab * b.work.width
    product = b.product(vocab, b.model.hidden)
    if not b.half:
        return logits * (2 if several else 1)
    return max(logits + b.wide(logits) + logits + (logits if several else 0.0), 2 * logits + product)
