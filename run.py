"""
A run and its surroundings: the ranks, signals, the folder with its checkpoints, and what they hold.

A run writes out/NAME/ and nothing else: config.json, metrics.jsonl, rollouts.jsonl, eval/,
tb/, checkpoints/step_N/ (the last two), model/ (a Hugging Face folder), curves.png.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from hf import file_dtype, read_json, save_folder, write_json
from learner import Learner, full_weights
from metrics import Totals

# --------------------------------------------------------------------------------------------------
# Ranks and signals. Collectives happen in gather, update, evaluate, full_weights and Run's methods,
# and never inside the sampler or the grader: ranks decode different numbers of steps.


def start_ranks() -> torch.device:
    """Joins the other ranks. One process is a world of one: the same path as under torchrun."""
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # objects travel over gloo
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def gather(value) -> list:
    """The value of every rank, in the order of ranks."""
    values = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


class Stop:
    """TERM and INT end the run at the next safe point, with a checkpoint; a second INT kills."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number, frame) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked_anywhere(self) -> bool:
        """On any rank: all of them learn it at the same point."""
        return any(gather(self.asked))


# --------------------------------------------------------------------------------------------------
# State


@dataclass
class State:
    """
    All that a checkpoint needs beside weights and optimizer, equal on all ranks. Random streams are
    functions of the step, so none is kept.
    """

    step: int = 0  # optimizer batches done
    cursor: int = 0  # position in the endless order of problems
    totals: Totals = field(default_factory=Totals)
    skipped: int = 0  # updates whose gradient was not finite
    skipped_in_a_row: int = 0
    memory: dict[int, tuple[float, ...]] = field(default_factory=dict)  # by problem id, see aero.py

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict) -> "State":
        """JSON writes every float so that it comes back to the bit, but keys as text."""
        memory = {int(problem): tuple(values) for problem, values in saved["memory"].items()}
        return cls(**saved | dict(totals=Totals(**saved["totals"]), memory=memory))


def learner_tensors(learner: Learner) -> dict:
    """By parameter name: shards stay shards, so that any number of ranks can load them."""
    named = dict(learner.model.named_parameters())
    tensors = {"weights": {name: p.detach() for name, p in named.items()}}
    for moment in ("step", "exp_avg", "exp_avg_sq"):
        tensors[moment] = {name: learner.optimizer.state[p][moment] for name, p in named.items()}
    return tensors


# --------------------------------------------------------------------------------------------------
# The folder


class Run:
    """The folder of a run. What is there must be of the same settings, see `open`."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def open(cls, cfg) -> "Run":
        """
        The run of these settings, new or to be continued; nothing is written yet. ValueError, one
        line, for a folder of other settings (`steps` aside: a run can be made longer) or files.
        """
        run = cls(Path(cfg.out) / cfg.name)
        config = run.folder / "config.json"
        if config.is_file():
            run.need_same_settings(cfg, read_json(config)["settings"])
        elif run.folder.exists() and any(run.folder.iterdir()):
            raise ValueError(
                f"{run.folder} holds files that are not a run's: give this one another --name"
            )
        return run

    def need_same_settings(self, cfg, saved: dict) -> None:
        unknown = sorted(saved.keys() - asdict(cfg).keys())
        if unknown:
            raise ValueError(
                f"{self.folder} is a run of another version, with --{unknown[0]}: "
                "give this one another --name"
            )
        before = asdict(type(cfg)()) | saved  # an older run lacks newer settings
        for name, value in asdict(cfg).items():
            if name not in ("steps", "out") and before[name] != value:
                raise ValueError(
                    f"{self.folder} is a run with --{name} {before[name]}, not {value}: "
                    "give this one another --name"
                )
        done = self.last_step()
        if done > cfg.steps:
            raise ValueError(
                f"{self.folder} has done {done} steps, --steps {cfg.steps} is less: "
                "give this one another --name"
            )

    def saved_settings(self) -> dict:
        """Of the last start; {} before the first."""
        path = self.folder / "config.json"
        return read_json(path)["settings"] if path.is_file() else {}

    def write_settings(self, cfg) -> None:
        about = dict(versions=versions(), world_size=dist.get_world_size())
        write_json(self.folder / "config.json", dict(settings=asdict(cfg)) | about)

    # ------------------------------------------------------------------------------- checkpoints

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step_{step}"

    def steps(self) -> list[int]:
        """Of the complete checkpoints, in order."""
        complete = self.folder.glob("checkpoints/step_*/state.json")
        names = [path.parent.name for path in complete if path.parent.suffix != ".partial"]
        return sorted(int(name.removeprefix("step_")) for name in names)

    def last_step(self) -> int:
        """0 where there is no checkpoint."""
        return max(self.steps(), default=0)

    def save(self, state: State, learner: Learner) -> None:
        """A fresh folder, renamed when all of it is on disk; then all but the last two go."""
        final = self.checkpoint(state.step)
        if gather(final.is_dir())[0]:  # stopped right after a resume: the same state is there
            return
        lead = dist.get_rank() == 0
        partial = final.with_suffix(".partial")
        if lead:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        dcp.save(learner_tensors(learner), checkpoint_id=partial)
        if lead:
            with open(partial / "state.json", "w") as file:
                json.dump(state.to_json(), file)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(final)
            for step in self.steps()[:-2]:
                shutil.rmtree(self.checkpoint(step))
        dist.barrier()

    def load(self, learner: Learner) -> State:
        """The last checkpoint into the learner; a new state where there is none."""
        steps = self.steps()
        if not steps:
            return State()
        folder = self.checkpoint(steps[-1])
        dcp.load(learner_tensors(learner), checkpoint_id=folder)
        return State.from_json(read_json(folder / "state.json"))

    # ------------------------------------------------------------------------------------ export

    def export(self, learner: Learner, tokenizer, card: str) -> None:
        """model/: a Hugging Face folder of the policy, in the dtype of the model it began with."""
        lead = dist.get_rank() == 0
        weights = {}
        for name, whole in full_weights(learner.model):
            if lead:
                weights[name] = whole.cpu()
        if not lead:
            return
        folder = self.folder / "model"
        partial = folder.with_suffix(".partial")
        old = folder.with_suffix(".old")
        shutil.rmtree(partial, ignore_errors=True)
        model_cfg = learner.model.cfg
        save_folder(partial, model_cfg, weights, tokenizer, file_dtype(model_cfg.raw))
        (partial / "README.md").write_text(card, encoding="utf-8")
        # The old one is renamed, so that a kill during its slow removal leaves a whole folder.
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def versions() -> dict:
    """What a figure of this run depends on beside its settings."""
    command = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return dict(
        commit=git.stdout.strip() or "unknown",
        torch=torch.__version__,
        python=sys.version.split()[0],
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    )
