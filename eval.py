"""
Avg@k and Pass@k on benchmarks, alone or from train.py.

    python eval.py --model out/tiny-aero-s0/model --data arithmetic:heldout --template none --max_new 128
    python eval.py --model Qwen/Qwen2.5-Math-1.5B --data math500 aime24 my.jsonl --k 8 --max_new 3072
    torchrun --nproc_per_node 8 eval.py ...                       problems are spread over the ranks
    python eval.py --regrade out/eval/x/math500.jsonl             grades saved responses again, generates nothing
    python eval.py --compare out/tiny-grpo-s0 out/tiny-aero-s0    runs of train.py: a table of differences, and compare.png

With c of the n samples of a problem right, in the mean over problems,

    avg@k  = c / n, where n = k
    pass@j = 1 - C(n - c, j) / C(n, j): the chance that j of the n samples, drawn without replacement, hold a right one
             (Chen et al., 2107.03374, eq. 1). Drawn with replacement it is biased: 0.684 for 1 of 4 at j = 4, where it is 1.

Standard errors are clustered by problem: samples of one problem are no independent draws, so the error is that of a mean
over problems, sd / sqrt(problems). It says how far the score might be off had other problems of the kind been asked.

Responses are saved as they were graded. The last line printed is one JSON object: {data set: summary with its settings},
or {setting: its scores, cost and differences} of a comparison.
"""

import hashlib
import json
import math
import os
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedTokenizerFast

import data
import reward
from model import Model, ModelConfig, load_weights, resolve
from rollout import Request, Sampler, Sampling


@dataclass
class Config:
    model: str = field(default="", metadata={"help": "model folder, or OWNER/NAME on the hub"})
    data: list[str] = field(default_factory=list, metadata={"help": f"files, hub names, arithmetic, {' '.join(data.NAMED)}"})
    k: int = field(default=8, metadata={"help": "responses per problem"})
    temperature: float = field(default=1.0, metadata={"help": "0 is greedy, and then k is 1"})
    top_p: float = field(default=1.0, metadata={"help": "nucleus, 1 is off"})
    top_k: int = field(default=0, metadata={"help": "only the most likely so many tokens, 0 is off"})
    max_new: int = field(default=1024, metadata={"help": "longest response in tokens"})
    template: str = field(default="qwen_math", metadata={"help": "qwen_math, r1, none, chat, a file, or text with {question}"})
    limit: int = field(default=0, metadata={"help": "first problems of each data set, 0 is all"})
    seed: int = field(default=0, metadata={"help": "root of the random streams"})
    slots: int = field(default=64, metadata={"help": "responses in flight on each rank"})
    workers: int = field(default=2, metadata={"help": "grading processes on each rank"})
    out: str = field(default="", metadata={"help": "folder for responses and summaries, out/eval/MODEL-TIME if empty"})
    regrade: list[str] = field(default_factory=list, metadata={"help": "saved .jsonl files to grade again, and nothing else"})
    compare: list[str] = field(default_factory=list, metadata={"help": "run folders to set against the first one"})


# --------------------------------------------------------------------------------------------------------------------
# Scores


def pass_at_k(n: int, c: int, k: int) -> float:
    """The pass@k that n samples with c right estimate without bias. pass_at_k(4, 1, 2) = 1 - 3/6 = 0.5"""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k: found n {n}, c {c}, k {k}, wanted 0 <= c <= n and 1 <= k <= n")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)  # integers, rounded once


def summarise(records: list[dict]) -> dict:
    """Scores of records with problem, level, score, reason, length, truncated. Raises ValueError for ragged groups."""
    groups, levels = defaultdict(list), defaultdict(set)
    for record in records:
        groups[record["problem"]].append(record)
        levels[record["level"]].add(record["problem"])
    sizes = sorted({len(group) for group in groups.values()})
    if len(sizes) != 1:
        raise ValueError(f"found {' or '.join(map(str, sizes)) or 'no'} responses to a problem, wanted one number for all")
    k = sizes[0]
    right = {problem: sum(r["score"] == 1 for r in group) for problem, group in groups.items()}

    def score(j, problems=right):
        return statistics.fmean(pass_at_k(k, right[p], j) for p in problems)

    def number(level):  # "Level 5", "4.25", "10" in the order of their numbers
        return [float(digits) for digits in re.findall(r"\d+(?:\.\d+)?", level)], level

    def error(j):  # None for a single problem, which says nothing about others
        values = [pass_at_k(k, c, j) for c in right.values()]
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

    return {
        "n": len(groups), "k": k,
        "avg_at_k": score(1), "avg_at_k_se": error(1), "pass_at_k": score(k), "pass_at_k_se": error(k),
        "pass_at": {str(j): score(j) for j in [2**i for i in range(k.bit_length()) if 2**i < k] + [k]},
        "truncated_frac": statistics.fmean(r["truncated"] for r in records),
        "unparsed_frac": statistics.fmean(r["reason"] == "unparsed" for r in records),
        "length_mean": statistics.fmean(r["length"] for r in records),
        "reasons": dict(Counter(r["reason"] for r in records).most_common()),
        "by_level": {
            level: {"n": len(levels[level]), "avg_at_k": score(1, levels[level]), "pass_at_k": score(k, levels[level])}
            for level in sorted(filter(None, levels), key=number)
        },
    }  # fmt: skip


def grader_version() -> str:
    """Digest of reward.py and answers.py: scores of two runs compare when they print the same one."""
    folder = Path(reward.__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in ("reward.py", "answers.py"))).hexdigest()[:12]


def evaluate(
    sampler, grader, tokenizer, problems, k: int, max_new: int, sampling, seed: int, rank=0, world=1, label="", stop=None
) -> tuple[dict | None, list[dict]]:
    """
    k responses to each problem, graded while others are decoded. Problem i goes to rank i % world. Every rank calls this
    once, with the same arguments, and gets (summary over all ranks, its own records). The random stream of a response
    hangs on (seed, problem id, sample) alone, so the scores are those of one rank. A truncated response is graded as it
    stands: a base model that boxes its answer and rambles on has answered (in training it is wrong, so that it learns to end).

    label: of a progress bar, none if empty. stop: once stop.asked on any rank, all return without a summary (None), as soon
    as the slowest of them has seen it or is done. Raises ValueError for k < 1, no problems, greedy decoding with k > 1.
    """
    if k < 1 or not problems:
        raise ValueError(f"evaluation: found k {k} and {len(problems)} problems, wanted one or more of each")
    if sampling.temperature == 0 and k > 1:
        raise ValueError(f"evaluation: greedy decoding gives k = {k} equal responses, wanted k = 1 or a temperature above 0")
    mine = {problem.id: problem for problem in problems[rank::world]}
    sampler.begin(seed, sampling)
    sampler.add(Request(p.id, sample, p.prompt, max_new) for p in mine.values() for sample in range(k))
    waiting, records = {}, []
    bar = tqdm(total=k * len(mine), desc=label, unit=" responses", leave=False, disable=not label or None)
    while (sampler.busy or waiting) and not (stop and stop.asked):
        for rollout in sampler.step():
            problem, key = mine[rollout.problem], (rollout.problem, rollout.index)
            response = tokenizer.decode(rollout.tokens, skip_special_tokens=True)
            waiting[key] = {
                "problem": problem.id, "sample": rollout.index, "level": problem.level,
                "prompt": tokenizer.decode(problem.prompt), "response": response, "gold": problem.gold,
                "length": len(rollout.tokens), "truncated": rollout.truncated,
            }  # fmt: skip
            grader.submit(key, response, problem.gold)
        for key, verdict in grader.poll() if sampler.busy else grader.wait(1.0):
            records.append(waiting.pop(key) | vars(verdict))
            bar.update()
    bar.close()
    stopped = bool(sampler.busy or waiting)
    records.sort(key=lambda r: (r["problem"], r["sample"]))
    long = ("prompt", "response", "gold", "extracted")  # the summary needs none of these, so they do not travel
    parts = [None if stopped else [{name: r[name] for name in r if name not in long} for r in records]] * world
    if world > 1:
        dist.all_gather_object(parts, parts[rank])
    if None in parts:
        return None, records
    settings = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k, "max_new": max_new}
    return summarise(list(chain(*parts))) | settings | {"seed": seed, "grader": grader_version()}, records


def regrade(records: list[dict], grader) -> list[dict]:
    """Saved records with the verdicts of today's reward.py."""
    for row, record in enumerate(records):
        grader.submit(row, record["response"], record["gold"])
    verdicts = {}
    while len(verdicts) < len(records):
        verdicts.update(grader.wait(1.0))
    return [record | vars(verdicts[row]) for row, record in enumerate(records)]


# --------------------------------------------------------------------------------------------------------------------
# What is shown and saved


def columns(lines: list[list[str]]) -> str:
    """Rows of cells as text, the first cell to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))] for line in lines)
    return "\n".join("  ".join(row).rstrip() for row in rows)


def table(results: dict[str, dict]) -> str:
    """Plain text columns: a line for each data set, one for each of its levels where there are 2 to 12, the settings."""
    ladder = sorted({int(j) for s in results.values() for j in s["pass_at"]})
    lines = [["data", "problems", "k", "avg@k", "+-", *(f"pass@{j}" for j in ladder), "truncated", "unparsed", "length"]]
    for name, s in results.items():
        passes = [f"{s['pass_at'][str(j)]:.3f}" if str(j) in s["pass_at"] else "" for j in ladder]
        error = "" if s["avg_at_k_se"] is None else f"{s['avg_at_k_se']:.3f}"
        shares = [f"{s['truncated_frac']:.3f}", f"{s['unparsed_frac']:.3f}", f"{s['length_mean']:.0f}"]
        lines.append([name, str(s["n"]), str(s["k"]), f"{s['avg_at_k']:.3f}", error, *passes, *shares])
        for level, part in s["by_level"].items() if 2 <= len(s["by_level"]) <= 12 else ():
            passes = [f"{part['pass_at_k']:.3f}" if j == s["k"] else "" for j in ladder]
            label = f"  level {level.removeprefix('Level ')}"
            lines.append([label, str(part["n"]), "", f"{part['avg_at_k']:.3f}", "", *passes, "", "", ""])
    names = ("model", "template", "temperature", "top_p", "top_k", "max_new", "seed", "grader")
    settings = {name: ", ".join(f"{key} {s[key]}" for key in names if key in s) for name, s in results.items()}
    if len(set(settings.values())) > 1:  # files to regrade may come from several evaluations
        settings = {name: f"{name}: {line}" for name, line in settings.items()}
    return "\n".join([columns(lines), *dict.fromkeys(settings.values())])


def save(folder: Path, name: str, records: list[dict], summary: dict) -> None:
    """NAME.jsonl with a response per line, and NAME.json with the summary and its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    partial = folder / f"{name}.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder / f"{name}.json")  # a summary that is there is complete


# --------------------------------------------------------------------------------------------------------------------
# The command: everything that can be wrong with the input is found before a process group, a worker or a GPU is touched


def parse(argv: list[str] | None) -> Config:
    """Raises ValueError, one line, for an unknown flag, a value of the wrong type, and settings that contradict."""
    parser = HfArgumentParser(Config, description="Avg@k and Pass@k on benchmarks.", allow_abbrev=False)

    def refuse(message):
        raise ValueError(message)

    parser.error = refuse
    cfg, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown {' '.join(unknown)}, known are {' '.join('--' + name for name in vars(cfg))}")
    if cfg.regrade or cfg.compare:
        return cfg
    for name in ("model", "data"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name} is missing")
    for name in ("k", "max_new", "slots", "workers"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name}: found {getattr(cfg, name)}, wanted 1 or more")
    if not math.isfinite(cfg.temperature):
        raise ValueError(f"--temperature: found {cfg.temperature}, wanted a finite number")
    if cfg.limit < 0:
        raise ValueError(f"--limit: found {cfg.limit}, wanted 0 or more")
    if cfg.temperature == 0 and cfg.k > 1:
        raise ValueError(f"--temperature 0 is greedy, and --k {cfg.k} responses would be equal: wanted --k 1")
    return cfg


def free_name(name: str, taken) -> str:
    """The first of NAME, NAME-2, NAME-3, ... that is not taken: two sets of one name are two sets."""
    return next(n for n in chain([name], (f"{name}-{i}" for i in count(2))) if n not in taken)


def keep_old(out: str, name: str) -> None:
    """Raises ValueError where `save` would write over responses."""
    if out and Path(out, f"{name}.jsonl").exists():
        raise ValueError(f"--out {out} holds {name}.jsonl already, wanted another folder")


def read_saved(path: Path) -> tuple[list[dict], dict]:
    """Records and summary that `save` wrote. Raises FileNotFoundError or ValueError when they are not such."""
    if not path.is_file():
        raise FileNotFoundError(f"--regrade {path}: no such file")
    needed = {"problem", "level", "response", "gold", "score", "reason", "length", "truncated"}
    records = list(data.json_rows(path))
    for number, record in enumerate(records, 1):
        missing = ", ".join(sorted(needed - record.keys()))
        if missing:
            raise ValueError(f"--regrade {path} row {number}: lacks {missing}, so it is no saved response")
    summary = path.with_suffix(".json")
    try:
        return records, summarise(records) | (json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {})
    except ValueError as error:
        raise ValueError(f"--regrade {path}: {error}") from None


def load_tokenizer(folder: str | Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """
    The tokenizer of a model folder, exactly as its tokenizer.json says: AutoTokenizer in transformers 5 picks a class by
    the model's type, and Qwen2's puts a splitting rule of its own in the place of the file's.

    Raises FileNotFoundError without that file, ValueError when it is damaged or has ids that the model does not know.
    """
    path = Path(folder, "tokenizer.json")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{path} is damaged: {str(error).strip().splitlines()[0]}") from None
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise ValueError(f"{path} has ids up to {highest}, the model's vocabulary ends before {vocab_size}")
    return tokenizer


def prepare(cfg: Config):
    """(model on the CPU, its config, tokenizer, {name: problems}), or ValueError or FileNotFoundError with one line."""
    Sampling(cfg.temperature, cfg.top_p, cfg.top_k)
    folder = resolve(cfg.model)
    model_cfg = ModelConfig.from_folder(folder)
    tokenizer = load_tokenizer(folder, model_cfg.vocab_size)
    context = model_cfg.max_position_embeddings
    if cfg.max_new >= context:
        raise ValueError(f"--max_new {cfg.max_new} leaves no room for a prompt in the model's context of {context} tokens")
    sets = {}
    for spec in cfg.data:
        problems = data.load(spec, tokenizer, cfg.template, cfg.limit, max_prompt=context - cfg.max_new)
        name = free_name(problems.report.name, sets)
        keep_old(cfg.out, name)
        sets[name] = problems
    with torch.device("meta"):
        model = Model(model_cfg).to(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    load_weights(model.to_empty(device="cpu"), folder)
    return model, model_cfg, tokenizer, sets


def run(cfg: Config, rank: int, world: int, model, model_cfg, tokenizer, sets) -> dict[str, dict]:
    """Summaries by data set. Rank 0 prints and saves."""
    grader = reward.Grader(cfg.workers)  # its processes start before CUDA does
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    context = cfg.max_new + max(len(p.prompt) for problems in sets.values() for p in problems)
    stop = data.stop_ids(tokenizer, model_cfg.eos_token_ids)
    sampler = Sampler(model_cfg, cfg.slots, context, stop, device, next(model.parameters()).dtype)
    sampler.load(model.named_parameters())
    sampling = Sampling(cfg.temperature, cfg.top_p, cfg.top_k)
    folder = Path(cfg.out or f"out/eval/{Path(cfg.model).resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}")
    results = {}
    for name, problems in sets.items():
        if rank == 0:
            print(problems.report, flush=True)
        label = name if rank == 0 else ""
        summary, records = evaluate(
            sampler, grader, tokenizer, problems, cfg.k, cfg.max_new, sampling, cfg.seed, rank, world, label
        )
        parts = [records] * world
        if world > 1:
            dist.gather_object(records, parts if rank == 0 else None)
        source = {"rows": problems.report.rows, "revision": problems.report.revision}
        results[name] = summary | {"model": cfg.model, "template": cfg.template} | source
        if rank == 0:
            save(folder, name, sorted(chain(*parts), key=lambda r: (r["problem"], r["sample"])), results[name])
    if rank == 0:
        print(f"responses saved in {folder}")
    grader.close()
    if world > 1:
        dist.destroy_process_group()
    return results


def prepare_regrade(cfg: Config) -> dict[str, tuple[str, list[dict], dict]]:
    """{name: (file, its records, its summary)}"""
    saved = {}
    for file in cfg.regrade:
        name = free_name(Path(file).stem, saved)
        keep_old(cfg.out, name)
        saved[name] = file, *read_saved(Path(file))
    return saved


def run_regrade(cfg: Config, saved: dict[str, tuple[str, list[dict], dict]]) -> dict[str, dict]:
    """Summaries by name, with the settings the responses were drawn with. Files are written only where --out says."""
    grader = reward.Grader(cfg.workers)
    results = {}
    for name, (file, records, before) in saved.items():
        fresh = regrade(records, grader)
        print(f"{file}: {sum(a['score'] != b['score'] for a, b in zip(records, fresh))} of {len(fresh)} scores changed")
        results[name] = before | summarise(fresh) | {"grader": grader_version()}
        if cfg.out:
            save(Path(cfg.out), name, fresh, results[name])
    grader.close()
    return results


def main(argv: list[str] | None = None) -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        cfg = parse(argv)
        if rank and (cfg.compare or cfg.regrade):
            return 0  # nothing to share: under torchrun one rank works
        if cfg.compare:
            import report  # matplotlib and TensorBoard, which nothing else here needs

            shown, results = report.compare(cfg.compare, Path(cfg.out or ".", "compare.png"))
        elif cfg.regrade:
            saved = prepare_regrade(cfg)
        else:
            inputs = prepare(cfg)
    except (ValueError, OSError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if not cfg.compare:
        results = run_regrade(cfg, saved) if cfg.regrade else run(cfg, rank, world, *inputs)
        shown = table(results)
    if rank == 0:
        print(shown)
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
