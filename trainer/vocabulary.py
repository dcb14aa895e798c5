"""The balanced vocabulary of a step: ties the passes of `parallel.balanced_vocab` to the model and its micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..configs.schema import Config
from ..models.stages import Inputs
from ..parallel.balanced_vocab import BalancedEmbedding, BalancedHead
from ..parallel.mesh import Mesh
from .setup import Parts


class BalancedVocabulary:
    """A `parallel.pipeline.runtime.Vocabulary` for one rank's part of the model.

    Args:
        parts: the model and the pipeline.
        mesh: of this rank.
        cfg: the job.
        inputs: a micro-batch by its number.
    """

    def __init__(self, parts: Parts, mesh: Mesh, cfg: Config, inputs: Callable[[int], Inputs]) -> None:
        raise NotImplementedError
