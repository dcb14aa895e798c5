"""A whole job on one rank: set up, resume, train, save, leave; and in the next mesh again, where a fault ended one."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ...configs import as_dict, hide
from ...configs.schema import Config
from ...models.costs.flops import layer_windows
from ...models.hf.folder import to_stderr
from ...parallel.comm.mesh import Mesh
from ...parallel.record import files
from ...parallel.record.files import RingFile
from ..checkpoint.hugging_face import load_initial
from ..checkpoint.names import checkpoints
from ..checkpoint.tiers.tiers import Tiers, open_tiers
from ..data.dataset import Dataset, open_data
from ..metrics.introduction import introduction
from ..metrics.notices import or_without
from ..metrics.sinks import EventLog, make_sinks
from ..processes.failure import is_loss
from ..processes.meeting import Stopped
from ..processes.start import Start, soon
from ..recovery.plan import Fenced
from ..recovery.rejoining import Epoch, Rejoining
from ..run_folder import RunFile, checkpoint_folder, hold, run_folder
from ..session import Here, Session, row_exchange
from ..setup import Ranks
from ..text.prompts import make_coder
from ..text.samples import PromptSampler
from ..text.tokenizer_files import TokenizerFiles, of_checkpoint, of_job
from ..trainer import Trainer
from .arrival import arrive
from .outputs import Outputs
from .peaks import agreed_peak, kept_peaks
from .telling import beginning, conclude_run, index_record, keep_own_record, write_configs
from .trying_out import try_out

_WATCHER_S = 30.0
"""For the watcher to be there; it starts with the ranks, and is much faster."""


def run(cfg: Config, start: Start) -> int:
    """Runs the job on this rank.

    Args:
        cfg: resolved and validated for the number of ranks.
        start: how the rank was started.

    Returns:
        0 when training went to its end, or did without this process, `faults.stop_code` when it was stopped cleanly
        before.

    Raises:
        Exception: what ended the job on this rank; it was told to `start` before anything was closed.
    """
    ranks = Ranks.from_environment(start.env)
    with ExitStack() as open_things:
        try:
            here = arrive(cfg, start, ranks, open_things)
            finished = RankOfJob(cfg, start, ranks, here, open_things).run()
        except Fenced:
            return 0
        except Exception as error:
            if not isinstance(error, Stopped):
                start.report(error, cfg)  # closing takes seconds, and makes other ranks fail
            raise
    return 0 if finished else cfg.faults.stop_code


class RankOfJob:
    """One process of a job, from its first mesh to its last.

    Args:
        cfg, start: as of `run`.
        ranks: which process it is.
        here: what it brings to every mesh.
        open_things: closed at its end.
    """

    def __init__(self, cfg: Config, start: Start, ranks: Ranks, here: Here, open_things: ExitStack) -> None:
        self._cfg, self._start, self._ranks, self._here, self._open_things = cfg, start, ranks, here, open_things
        self._run_dir = run_folder(cfg)
        self._rings: list[RingFile] = []
        self._outputs: Outputs | None = None
        self._events: EventLog | None = None
        self._data: Dataset | None = None
        self._resumed: Path | None = None
        """The checkpoint that the job went on from."""
        self._holds = ranks.rank == 0
        """Whether this process has the run's folder for itself."""
        self._rejoining = Rejoining.of(cfg, start, here)
        if self._rejoining is not None:
            open_things.callback(self._rejoining.close)

    def run(self) -> bool:
        """Trains, and keeps the record; whether training went to its end."""
        epoch, rejoining = Epoch(0, tuple(range(self._ranks.world))), self._rejoining
        if rejoining is not None and self._ranks.rank >= self._ranks.world:
            self._data = self._open_data()
            epoch = rejoining.called()
        while True:
            try:
                finished = self._in_mesh(epoch)
                break
            except Exception as error:
                following = rejoining.following(epoch, error) if rejoining is not None else None
                if following is None:
                    self._fail(error)
                    raise
                epoch = following
        if self._ranks.local_rank == 0:
            with or_without(str(files.record_folder(self._run_dir))):
                files.collect(self._run_dir, self._rings, remove=True)
        return finished

    def _fail(self, error: Exception) -> None:
        self._start.report(error, self._cfg)
        self._close_outputs()
        self._here.recorder.close()
        keep_own_record(self._run_dir, self._ranks, self._rings)
        self._here.recorder.vitals.left()

    def _in_mesh(self, epoch: Epoch) -> bool:
        """Trains in one mesh."""
        rejoining, cfg = self._rejoining, self._cfg
        state, restore = None, None
        if rejoining is not None:
            self._here = rejoining.here
            state, restore = rejoining.brings(epoch, self._resumed)
        session = Session.open(
            cfg if rejoining is None else rejoining.job_in(epoch),
            epoch.members,
            epoch.number,
            here=self._here,
            met=partial(self._met, epoch),
            data=self._open_data,
            peak=partial(agreed_peak, cfg, self._here.device, kept_peaks(cfg, self._run_dir)),
            state=state,
            restore=restore,
            outer=self._open_things if rejoining is None else None,
        )
        if rejoining is not None:
            self._open_things.callback(session.close)
            rejoining.opened(session)
        self._data = session.data
        tiers = self._tiers(session.mesh)
        try:
            trainer = self._prepare(session, tiers, epoch)
            began_at = 0 if epoch.number else trainer.step
            finished = trainer.train(self._outputs, self._start.stop)
            if rejoining is not None:
                session.mesh.barrier()
                rejoining.finished()
        except Exception as error:
            if rejoining is None:
                self._start.report(error, cfg)  # before anything is closed, which takes its time
            raise
        finally:
            tiers.close()
        if self._outputs is not None:
            self._outputs.events.log("end" if finished else "stopped", step=trainer.step)
            self._close_outputs()
            conclude_run(self._cfg, self._run_dir, trainer.step, began_at, finished)
        self._meet_last(session.mesh)  # every ring is complete
        self._here.recorder.close()
        self._meet_last(session.mesh)  # and says so: a copy of one that does not is of a rank that died
        return finished

    def _meet_last(self, mesh: Mesh) -> None:
        """All that the job was for is done: whoever is lost now is missed by nobody."""
        try:
            mesh.barrier()
        except Exception as error:
            if self._rejoining is None or not is_loss(error):
                raise

    def _met(self, epoch: Epoch, mesh: Mesh) -> None:
        """The ranks have met; nothing is built yet."""
        if epoch.number == 0 and self._start.vitals is not None and self._ranks.local_rank == 0:
            soon(lambda: self._here.recorder.vitals.watched, _WATCHER_S)  # what fails from here on is seen
        if mesh.is_first and not self._holds:
            self._open_things.push(hold(self._cfg, self._start.env))
            self._holds = True
        if mesh.is_first and epoch.number == 0:
            write_configs(self._run_dir, self._cfg, self._start.given)
        self._rings = index_record(self._run_dir, mesh, self._here.rank, self._ranks.run_id, self._here.store)
        if self._rejoining is not None:
            self._rejoining.met()

    def _open_data(self) -> Dataset:
        cfg = self._cfg
        return self._data or open_data(
            cfg.data,
            seq_len=cfg.train.seq_len,
            vocab=cfg.model.used_vocab,
            seed=cfg.train.seed,
            windows=layer_windows(cfg.model),
            progress=self._here.rank == 0,
        )

    def _prepare(self, session: Session, tiers: Tiers, epoch: Epoch) -> Trainer:
        """Everything up to the first step in a mesh."""
        cfg, mesh, rejoining = self._cfg, session.mesh, self._rejoining
        rows = row_exchange(session, self._rings, self._here.store)
        if epoch.number == 0:
            try_out(session, rows, self._events)
        keeper = rejoining.keeper if rejoining is not None else None
        trainer = Trainer(session, tiers.shared, run_dir=self._run_dir, rows=rows, keeper=keeper, local=tiers.local)
        point = rejoining.point if rejoining is not None else None
        if point is None:
            self._begin(trainer, epoch)
        else:
            self._resumed = rejoining.resumed if rejoining is not None else None
            trainer.go_on(point)
        trainer.tokenizer = _tokenizer(cfg, self._resumed)
        for each in tiers.all:
            each.beside = trainer.tokenizer.files
        if cfg.eval.prompts and trainer.evaluator is not None:
            coder = make_coder(trainer.tokenizer, f"data.name={cfg.data.name}")
            stops, pipeline = trainer.tokenizer.stops, session.parts.pipeline
            trainer.evaluator.sampler = PromptSampler(session.cfg, mesh, pipeline, trainer.stepper, coder, stops)
        if mesh.is_first:
            self._report(trainer, epoch)
        if rejoining is not None:
            rejoining.ready(trainer, self._outputs)
        return trainer

    def _begin(self, trainer: Trainer, epoch: Epoch) -> None:
        """From a checkpoint or from the first step."""
        cfg, checkpointer = self._cfg, trainer.checkpointer
        # After a fault in which the newest state was lost, from what this run has saved itself.
        resume = "latest" if epoch.number else cfg.checkpoint.resume
        self._resumed = trainer.tiers.find_resume(resume, trainer.tensors) if resume else None
        if epoch.number and trainer.mesh.is_first:
            print(f"no copy of the newest state is left; {beginning(cfg, trainer, self._resumed)}", flush=True)
        if self._resumed is not None:
            trainer.restore(self._resumed)
        elif cfg.checkpoint.init:
            init, upcycle, seed = Path(cfg.checkpoint.init), cfg.checkpoint.upcycle, cfg.train.seed
            notice = to_stderr if trainer.mesh.is_first else (lambda _: None)
            load_initial(init, trainer.parts, checkpointer, upcycle=upcycle, seed=seed, notice=notice)

    def _tiers(self, mesh: Mesh) -> Tiers:
        if mesh.is_first and self._events is None:
            self._events = EventLog(self._run_dir / RunFile.EVENTS)
        events = self._events if mesh.is_first else None

        def report(event: dict[str, Any]) -> None:
            if events is not None:
                events.log(**event)

        return open_tiers(self._cfg, mesh, report)

    def _report(self, trainer: Trainer, epoch: Epoch) -> None:
        """Opens what the first slot reports to, where this process has it not open yet."""
        cfg, run_dir, again = self._cfg, self._run_dir, epoch.number > 0
        assert self._events is not None
        if self._outputs is not None:
            if self._rejoining is not None and self._rejoining.point is not None:
                return
            self._outputs.sinks.close()  # what was logged since is dropped, as by every restart from a checkpoint
        if not again:
            known = introduction(cfg, trainer.data, trainer.peak, device=trainer.device.type, apart=trainer.mesh.apart)
            lines = [*known, beginning(cfg, trainer, self._resumed)]
            print(hide(cfg, "\n".join(lines)), flush=True)
        sinks = make_sinks(cfg.log, run_dir, as_dict(cfg), cfg.train.steps, trainer.step, again=again)
        self._outputs = Outputs(sinks, self._events, trainer.step)
        if not again:
            with or_without(f"{run_dir}/{RunFile.PROGRAM}"):
                (run_dir / RunFile.PROGRAM).write_text(trainer.program.to_json() + "\n")
            world, program = trainer.mesh.degrees.world, trainer.program.hash
            self._events.log("start", step=trainer.step, world=world, program=program)

    def _close_outputs(self) -> None:
        outputs, self._outputs = self._outputs, None
        if outputs is not None:
            outputs.close()


def _tokenizer(cfg: Config, found: Path | None) -> TokenizerFiles:
    """Of the checkpoint that the run went on from, or a later one, where that is not kept any more; else of the job."""
    if found is not None and not found.is_dir():
        found = next((path for _, path in checkpoints(checkpoint_folder(cfg))), None)
    kept = TokenizerFiles() if found is None else of_checkpoint(found)
    return of_job(cfg) if kept.kind == "none" else kept
