"""
Every setting of a run in one flat block, and how a command line becomes one.

Weakest first: the default of the field, what PRESETS says for the kind of model, what the authors
of the algorithm published (aero.ALGORITHMS), the flags in order. `@FILE` among the flags stands for
the flags in that file. `--help` prints the values that would run with the flags beside it.
"""

import argparse
import math
import shlex
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import torch

import aero


def knob(default, help, choices=None, least=None, above=None, most=None, below=None):
    """A dataclass field with the help text and the bounds of its flag."""
    metadata = dict(
        help=help, choices=choices, least=least, above=above, most=most, below=below
    )
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Knobs:
    """What `parse` asks of a dataclass of knobs."""

    def starting_values(self) -> dict:
        """Defaults that hang on other flags."""
        return {}

    def complete(self) -> None:
        """Fills in what hangs on the rest."""

    def check(self) -> None:
        """ValueError, one line, for settings that contradict each other."""


@dataclass
class Config(Knobs):
    """A run of train.py. The defaults are those of `python train.py`."""

    # model and data
    model: str = knob(
        "", "model folder or hub name; empty: the embedded base model, made at first start"
    )
    base: str = knob(
        "tiny",
        "embedded base model: tiny, or small, of 24 million parameters, which wants a GPU",
        ("tiny", "small"),
    )
    data: str = knob(
        "arithmetic:train:8000:1-7",
        "problems to train on: file, hub name, built-in task (see data.py)",
    )
    eval_data: str = knob(
        "arithmetic:heldout:196:1-7", "problems to evaluate on, comma-separated; empty: none"
    )
    limit: int = knob(0, "problems to train on, the first so many; 0: all", least=0)
    template: str = knob(
        "none", "prompt template: qwen_math, r1, none, chat, a file, or text with {question}"
    )
    reward: str = knob(
        "math",
        "what scores a response: math, or module:function or file.py:function (see reward.py)",
    )

    # which rollouts to draw, keep and how to weigh them (aero.py)
    algo: str = knob(
        "aero", "aero or a baseline; the published settings of each come with it", aero.ALGORITHMS
    )
    n_explore: int = knob(
        8, "rollouts of every problem in the first round (aero, reinforce_ada)", least=1
    )
    n_extra: int = knob(
        2, "rollouts in each further round of a problem (aero, reinforce_ada)", least=1
    )
    n_total: int = knob(
        16, "most rollouts of one problem; the group size of algorithms that draw once", least=1
    )
    n_keep: int = knob(
        4, "rollouts kept of a group by those that down-sample (pods, reinforce_ada)", least=1
    )
    u_res: float = knob(
        0.0, "rescue where the success rate after the first round is at most this", least=0.0
    )
    k: int = knob(1, "rejection keeps k wrong rollouts for each right one", least=1)
    n_same: int = knob(4, "rollouts kept of a flat group, weighed by the posterior", least=1)
    prior_a: float = knob(
        1.0, "Beta prior of the success rate: pseudo-count of right rollouts", above=0.0
    )
    prior_b: float = knob(
        1.0, "Beta prior of the success rate: pseudo-count of wrong rollouts", above=0.0
    )
    rescue: bool = knob(True, "strategy 1, iterative rescue")
    posterior: bool = knob(
        True, "strategy 2, posterior for flat groups; without it they are not trained on"
    )
    rejection: bool = knob(True, "strategy 3, selective rejection")
    rescue_budget: str = knob(
        "prompt",
        "prompt: n_total per problem | pool: spare rollouts of the step, dealt round-robin",
        ("prompt", "pool"),
    )
    posterior_advantage: str = knob(
        "zscore", "zscore: (r - u~) / sqrt(u~ (1 - u~)) | signed: 2 u~ - 1", ("zscore", "signed")
    )
    refill_cap: int = knob(
        10, "dapo: at most this many times are flat groups replaced in one step", least=0
    )
    n_reference: int = knob(
        16, "group size of the GRPO run that compute/saved_frac compares with", least=1
    )

    # loss
    loss: str = knob("clip", "a loss of aero.LOSSES", aero.LOSSES)
    loss_norm: str = knob(
        "prompt",
        "mean over problems of the mean over rollouts of the mean over tokens (prompt), "
        "over all tokens (token), or sum / (max_new x rollouts) (constant)",
        aero.LOSS_NORMS,
    )
    clip_low: float = knob(
        0.2, "the policy ratio is clipped below 1 - clip_low", above=0.0, below=1.0
    )
    clip_high: float = knob(0.2, "the policy ratio is clipped above 1 + clip_high", above=0.0)
    is_cap: float = knob(
        0.0,
        "truncated importance weights min(learner / sampler, cap) on tokens; 0: none",
        least=0.0,
    )

    # sampling
    problems: int = knob(32, "problems per step, over all ranks", least=1)
    max_new: int = knob(96, "most response tokens; longer ones are cut and count as wrong", least=1)
    temperature: float = knob(
        1.0, "of the policy, when it samples and when it is trained", above=0.0
    )
    slots: int = knob(256, "rollouts in flight per rank, at most", least=1)
    kv_gib: float = knob(
        0.0, "GiB of KV cache per rank; 0: what the slots can fill, as far as there is", least=0.0
    )
    graders: int = knob(1, "grading processes per rank", least=1)

    # learning
    steps: int = knob(120, "optimizer batches", least=1)
    updates_per_batch: int = knob(
        1, "optimizer steps on each batch; above 1 the ratio leaves 1", least=1
    )
    lr: float = knob(3e-4, "learning rate after warm-up, see lr_at in train.py", above=0.0)
    warmup: int = knob(5, "steps of linear warm-up", least=0)
    weight_decay: float = knob(0.0, "of AdamW, on matrices", least=0.0)
    grad_clip: float = knob(1.0, "largest gradient norm", above=0.0)
    micro_tokens: int = knob(16384, "tokens per micro-batch, prompt and response", least=1)
    checkpoint_activations: bool = knob(
        False, "recompute blocks in backward: less memory, a third more FLOPs"
    )
    compile: bool = knob(
        False, "torch.compile the blocks: a tenth faster, less memory, ten seconds of start-up"
    )
    shard: str = knob(
        "node",
        "weights sharded inside a node, replicated across, or over all ranks",
        ("node", "world"),
    )
    reshard: bool = knob(
        False, "free gathered weights and gradients after every block: less memory, more traffic"
    )

    # the run
    seed: int = knob(0, "root of every random stream", least=0)
    out: str = knob("out", "folder for runs and the embedded base model")
    name: str = knob("", "folder of this run under --out; empty: MODEL-ALGO-sSEED")
    eval_every: int = knob(
        20, "steps between evaluations; there is one before step 0 and one at the end", least=1
    )
    eval_k: int = knob(8, "responses per problem in an evaluation", least=1)
    eval_limit: int = knob(0, "problems per evaluation set; 0: all", least=0)
    save_every: int = knob(40, "steps between checkpoints; there is one at the end", least=1)
    show_every: int = knob(40, "steps between sample rollouts on the console", least=1)

    def preset(self) -> str:
        """Which of PRESETS this run starts from."""
        return "pretrained" if self.model else self.base

    def starting_values(self) -> dict:
        """What the preset and the algorithm change, unless a flag says otherwise."""
        return PRESETS[self.preset()] | aero.ALGORITHMS[self.algo].defaults

    def complete(self) -> None:
        self.name = self.name or f"{Path(self.model).name or self.base}-{self.algo}-s{self.seed}"

    def check(self) -> None:
        aero.ALGORITHMS[self.algo].check(self)
        if self.model and self.base != "tiny":
            raise ValueError(f"--base {self.base} --model {self.model}: wanted one of the two")
        if Path(self.name).name != self.name or self.name.startswith("."):
            raise ValueError(
                f"--name {self.name}: wanted a plain folder name under --out {self.out}"
            )


# What the kind of model changes.
#   tiny        nothing
#   small       problems of which a third is settled from the start, one way or the other
#   pretrained  Qwen2.5-Math-1.5B on MATH with a context of 4096. Compiling takes ten seconds
#               once and a tenth off every update; on a CPU a minute, for little.
PRESETS = {
    "tiny": {},
    "small": dict(
        data="arithmetic:train:16000:5-18", eval_data="arithmetic:heldout:1400:5-18",
        problems=16, max_new=1024, slots=1024, steps=100, lr=3e-5, save_every=100,
    ),
    "pretrained": dict(
        data="math", eval_data="math500", template="qwen_math", problems=128, max_new=3072,
        graders=4, steps=400, lr=1e-6, warmup=10, compile=torch.cuda.is_available(),
        eval_k=4, save_every=20, show_every=5,
    ),
}  # fmt: skip


def default_of(knob_field):
    return knob_field.default_factory() if knob_field.default is MISSING else knob_field.default


def differing(cfg) -> dict:
    """{setting: value} of all that are not the default of their field."""
    values = asdict(cfg)
    return {f.name: values[f.name] for f in fields(cfg) if values[f.name] != default_of(f)}


def check_choices(cfg) -> None:
    """ValueError, one line, for the first setting that is not among the choices of its knob."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        choices = f.metadata["choices"]
        if choices is not None and value not in choices:
            raise ValueError(f"--{f.name} {value}: wanted one of {' '.join(choices)}")


def check_fields(cfg) -> None:
    """ValueError, one line, for the first setting outside the choices or bounds of its knob."""
    check_choices(cfg)
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        bounds = f.metadata
        flag = f"--{f.name} {value}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{flag}: wanted a finite number")
        if bounds["least"] is not None and value < bounds["least"]:
            raise ValueError(f"{flag}: wanted {bounds['least']:g} or more")
        if bounds["above"] is not None and value <= bounds["above"]:
            raise ValueError(f"{flag}: wanted a number above {bounds['above']:g}")
        if bounds["most"] is not None and value > bounds["most"]:
            raise ValueError(f"{flag}: wanted at most {bounds['most']:g}")
        if bounds["below"] is not None and value >= bounds["below"]:
            raise ValueError(f"{flag}: wanted a number below {bounds['below']:g}")


class Parser(argparse.ArgumentParser):
    """Errors are exceptions, and a file of flags may have comments and several flags on a line."""

    def error(self, message):
        raise ValueError(message)

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)


HIDDEN = dict(help=argparse.SUPPRESS)


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted True or False")
    return text.lower() == "true"


def make_parser(kind: type, description: str) -> Parser:
    parser = Parser(
        description=description, usage="%(prog)s [@FILE] [--FLAG VALUE] ...", add_help=False,
        allow_abbrev=False, fromfile_prefix_chars="@",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="store_true", help="print the values that would run")
    for f in fields(kind):
        default = default_of(f)
        help = f.metadata["help"].replace("%", "%%") + " [%(default)s]"
        if f.metadata["choices"] is not None:
            help = f"{help} of {' '.join(f.metadata['choices'])}"
        options = dict(default=default, help=help, metavar=f.name.upper())
        if isinstance(default, bool):
            parser.add_argument(f"--{f.name}", type=truth, nargs="?", const=True, **options)
            parser.add_argument(f"--no_{f.name}", dest=f.name, action="store_false", **HIDDEN)
        elif isinstance(default, list):
            parser.add_argument(f"--{f.name}", nargs="+", **options)
        else:
            parser.add_argument(f"--{f.name}", type=type(default), **options)
    return parser


def parse(kind: type, argv: list[str], description: str):
    """
    A `kind`, checked. ValueError, one line, for anything unknown, out of bounds or contradictory.

    kind: a dataclass of knobs with the methods of Knobs.
    """
    parser = make_parser(kind, description)
    try:
        values, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if unknown:
        known = " ".join(f"--{f.name}" for f in fields(kind))
        raise ValueError(f"unknown {' '.join(unknown)}; known are {known}")
    cfg = kind(**{f.name: getattr(values, f.name) for f in fields(kind)})
    check_choices(cfg)  # --algo and --base are looked up next
    parser.set_defaults(**cfg.starting_values())
    values = parser.parse_args(argv)
    cfg = kind(**{f.name: getattr(values, f.name) for f in fields(kind)})
    if values.help:
        parser.set_defaults(**asdict(cfg))
        print(parser.format_help())
        raise SystemExit(0)
    cfg.complete()
    check_fields(cfg)
    cfg.check()
    return cfg
