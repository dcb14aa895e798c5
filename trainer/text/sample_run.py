"""Text from a checkpoint in the layout of its run: one rank of it, whose job is a file beside its configuration."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from ...configs.schema import Config
from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.hugging_face import load_initial
from ..checkpoint.retention import Retention
from ..job.arrival import arrive
from ..processes.start import Start
from ..run_folder import checkpoint_folder
from ..session import Session
from ..setup import Ranks
from .prompts import make_coder
from .samples import PromptSampler
from .tokenizer_files import of_checkpoint

REQUEST = "request.json"
"""What is wanted: prompts and count."""
ANSWER = "answer.json"
"""What rank 0 leaves: prompt, text and tokens of each."""


def sample(cfg: Config, start: Start) -> int:
    """Continues the prompts of the request with the likeliest tokens; a job for `trainer.__main__.main`.

    Args:
        cfg: the run's, with `checkpoint.init` for the checkpoint and a runs_dir that is thrown away.
        start: how the rank was started.
    """
    with ExitStack() as open_things:
        try:
            ranks = Ranks.from_environment(start.env)
            here = arrive(cfg, start, ranks, open_things)
            session = Session.open(cfg, range(ranks.world), 0, here=here, trains=False, outer=open_things)
            _answer(session, Path(start.config).parent)
        except Exception as error:
            start.report(error, cfg)
            raise
    return 0


def _answer(session: Session, folder: Path) -> None:
    cfg, mesh, parts = session.cfg, session.mesh, session.parts
    request = json.loads((folder / REQUEST).read_text())
    checkpointer = Checkpointer(
        checkpoint_folder(cfg),
        group=mesh.checkpoint_group,
        rank=mesh.rank,
        world=mesh.degrees.world,
        keep=Retention(),
        asynchronous=False,
        on_event=lambda _: None,
        abort=mesh.abort,
    )
    init = Path(cfg.checkpoint.init or "")
    load_initial(init, parts, checkpointer, notice=lambda _: None)
    try:
        tokenizer = of_checkpoint(init)
        coder = make_coder(tokenizer, str(init))
        found = PromptSampler(cfg, mesh, parts.pipeline, session.stepper, coder, tokenizer.stops)(
            request["prompts"], request["count"]
        )
    finally:
        checkpointer.close()
    if mesh.is_first:
        answers = [{"prompt": one.prompt, "text": one.text, "tokens": list(one.tokens)} for one in found]
        (folder / ANSWER).write_text(json.dumps(answers))
