"""
Reinforcement learning with verifiable rewards, by AERO (arXiv 2602.14338) or one of its baselines.

    python train.py                        the built-in task and its tiny base model, CPU or one GPU
    python train.py --algo grpo            the same with GRPO
    python train.py --base small           a larger base model and harder problems, on a GPU
    torchrun --nproc_per_node 8 train.py --model Qwen/Qwen2.5-Math-1.5B       MATH, on 8 GPUs
    python train.py @FILE                  flags from a file; `--help` explains them

One step:  problems -> Sampler -> Grader -> aero.choose -> micro-batches, FSDP2 -> Sampler.load

Two problems never wait for each other: the next round of a problem is requested as soon as its own
rollouts are graded, while the sampler decodes those of others. A decision is only taken on complete
rounds; on half a round, the shorter half would decide.

The same command again continues from the last checkpoint. Nothing that decides the result depends
on the number of ranks, on micro-batches or on who finished first: random streams hang on (seed,
step, place, index, position), denominators are counted once over all ranks.

Deviations from the paper, whose appendix was not public when this was written:
 1. n_explore 8, n_extra 2, n_total 16, n_same 4, Beta(1, 1) are our reading of its description.
 2. Strictly on-policy by default: one optimizer step per batch, so the ratio is exactly 1 and the
    clip never acts.
 3. No KL term.
 4. A truncated response is wrong whatever it says, and is trained on like any other wrong one;
    an evaluation grades it as it stands.

A fork is a script that registers what it changes and calls main():  see "Change it" in README.md.
"""

import itertools
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin; read with torch

import numpy as np
import torch
import torch.distributed as dist

import aero
import data
import eval
import report
from config import Config, parse
from hf import find_weights, load_tokenizer, read_config, read_json, read_weights, resolve, stop_ids
from learner import Learner, Trained, full_weights, make_learner, update
from log import Log, header
from metrics import Clock, GroupRecord, describe, speeds
from model import Model, ModelConfig
from plan import plan_memory
from reward import Grader, Reward, Verdict, load_reward
from rollout import Request, Rollout, Sampler, Sampling, graded
from run import Run, State, Stop, gather, start_ranks, versions
from streams import generator, stream
from tasks.base import base_config, base_model, character_tokenizer

BAD_STEPS = 5  # steps in a row without a finite gradient that end a run


class RunError(RuntimeError):
    """What ends a run, in one line."""


def lr_at(step: int, cfg) -> float:
    """Learning rate of optimizer batch `step` (from 0): linear warm-up, then constant."""
    return cfg.lr * min(1.0, (step + 1) / (cfg.warmup + 1))


# --------------------------------------------------------------------------------------------------
# Sample and grade


@dataclass
class OpenGroup:
    """The rollouts of one problem in one step, while they are drawn. `place`: which of the step's
    problems, the same on any number of ranks."""

    place: int
    problem: data.Problem
    memory: tuple[float, ...] = ()
    rounds: list[int] = field(default_factory=list)  # in which rollout i was asked for
    rollouts: dict[int, Rollout] = field(default_factory=dict)  # by index; they end in any order
    verdicts: dict[int, Verdict] = field(default_factory=dict)

    def request(self, n: int, max_new: int) -> list[Request]:
        """A round of n more."""
        first = len(self.rounds)
        number = self.rounds[-1] + 1 if self.rounds else 0
        self.rounds += [number] * n
        indices = range(first, first + n)
        return [Request(self.problem, self.place, index, max_new) for index in indices]

    def take(self, rollout: Rollout, verdict: Verdict) -> None:
        index = rollout.request.index
        self.rollouts[index] = rollout
        self.verdicts[index] = verdict

    @property
    def complete(self) -> bool:
        return len(self.verdicts) == len(self.rounds)

    @property
    def group(self) -> aero.Group:
        """What an algorithm sees. A truncated rollout is wrong whatever it says."""
        rewards = []
        for index in range(len(self.rounds)):
            score = self.verdicts[index].score
            rewards.append(min(score, 0.0) if self.rollouts[index].truncated else score)
        return aero.Group(np.array(rewards, dtype=np.float64), self.problem.id, self.memory)


class Engine(NamedTuple):
    """What draws and grades."""

    sampler: Sampler
    grader: Grader
    tokenizer: object
    stop: Stop


def draw(asked: list[tuple[OpenGroup, int]], cfg, engine: Engine) -> None:
    """So many rollouts of each group, and all further rounds that the algorithm asks for. After a
    stop signal it returns early, with incomplete groups."""
    more = aero.ALGORITHMS[cfg.algo].more
    by_place = {group.place: group for group, _ in asked}
    for group, n in asked:
        engine.sampler.add(group.request(n, cfg.max_new))
    for rollout, verdict in graded(*engine):
        group = by_place[rollout.request.place]
        group.take(rollout, verdict)
        if group.complete:
            engine.sampler.add(group.request(more(group.group, cfg), cfg.max_new))


def draw_step(problems, state: State, cfg, engine: Engine) -> tuple[list[OpenGroup], int]:
    """
    This rank's groups of one step, complete unless stopped, and the cursor after it. Problems come
    from an endless order of epochs: number `place` of the step is drawn by rank place % world.
    """
    algo = aero.ALGORITHMS[cfg.algo]
    rank, world = dist.get_rank(), dist.get_world_size()

    def open_groups(places: range) -> list[OpenGroup]:
        mine = [place for place in places if place % world == rank]
        numbers = [data.nth(len(problems), cfg.seed, state.cursor + place) for place in mine]
        return [
            OpenGroup(place, problems[number], state.memory.get(problems[number].id, ()))
            for place, number in zip(mine, numbers)
        ]

    def explore(fresh: list[OpenGroup]) -> None:
        nothing = np.zeros(0)
        firsts = [algo.first(aero.Group(nothing, g.problem.id, g.memory), cfg) for g in fresh]
        draw(list(zip(fresh, firsts)), cfg, engine)

    taken = cfg.problems
    groups = open_groups(range(taken))
    explore(groups)

    # Rounds whose size depends on other problems: the only ones at which ranks meet.
    pooled = cfg.algo == "aero" and cfg.rescue and cfg.rescue_budget == "pool"
    while pooled and not engine.stop.asked_anywhere():
        drawn = [(g.place, len(g.rounds), aero.unsolved(g.group, cfg)) for g in groups]
        drawn = sorted(itertools.chain(*gather(drawn)))
        waiting = [place for place, _, unsolved in drawn if unsolved]
        spare = cfg.problems * cfg.n_total - sum(n for _, n, _ in drawn)
        share = dict(zip(waiting, aero.deal(len(waiting), spare, cfg)))
        if not any(share.values()):
            break
        draw([(g, share[g.place]) for g in groups if share.get(g.place)], cfg, engine)

    for _ in range(cfg.refill_cap if algo.refill else 0):
        if engine.stop.asked_anywhere():  # groups may be incomplete
            break
        mixed = sum(not aero.is_flat(g.group.rewards) for g in groups)
        missing = cfg.problems - sum(gather(mixed))
        if missing == 0:
            break
        fresh = open_groups(range(taken, taken + missing))
        taken += missing
        groups += fresh
        explore(fresh)
    return groups, state.cursor + taken


# --------------------------------------------------------------------------------------------------
# Keep and weigh


def choose_batch(
    groups: list[OpenGroup], step: int, cfg
) -> tuple[list[Trained], list[GroupRecord]]:
    """
    What the whole step trains on and one record per group, of all ranks, in the order of places.
    RunError, on every rank, for rewards that the algorithm has no meaning for.
    """
    batch, records, complaint = [], [], None
    try:
        for g in groups:
            chosen = aero.choose(g.group, cfg, generator(cfg.seed, "keep", step, g.place))
            records.append(record(g, chosen))
            batch += trained(g, chosen)
    except aero.RewardError as error:
        complaint = str(error)
    complaints = [text for text in gather(complaint) if text]
    if complaints:
        raise RunError(complaints[0])
    batch = itertools.chain(*gather(batch))
    records = itertools.chain(*gather(records))
    # sorted() is stable: the kept rollouts of a group stay in their order
    return sorted(batch, key=lambda x: x.place), sorted(records, key=lambda r: r.place)


def trained(g: OpenGroup, chosen: aero.Chosen) -> list[Trained]:
    rows = []
    for index, advantage in zip(chosen.kept, chosen.advantage):
        rollout = g.rollouts[index]
        row = Trained(g.place, g.problem.prompt, rollout.tokens, rollout.logps, float(advantage))
        rows.append(row)
    return rows


def record(g: OpenGroup, chosen: aero.Chosen) -> GroupRecord:
    rollouts = [g.rollouts[index] for index in range(len(g.rounds))]
    return GroupRecord(
        place=g.place,
        problem=g.problem.id,
        prompt=len(g.problem.prompt),
        rewards=g.group.rewards.tolist(),
        rounds=g.rounds,
        kept=chosen.kept.tolist(),
        advantage=chosen.advantage.tolist(),
        lengths=[len(rollout.tokens) for rollout in rollouts],
        truncated=[rollout.truncated for rollout in rollouts],
        reasons=[g.verdicts[index].reason for index in range(len(g.rounds))],
    )


def remember(records: list[GroupRecord], state: State, cfg) -> None:
    """The memory of the step's problems, if the algorithm keeps one; the same on all ranks."""
    algo = aero.ALGORITHMS[cfg.algo]
    if algo.remember is None:
        return
    for r in records:
        group = aero.Group(np.array(r.rewards), r.problem, state.memory.get(r.problem, ()))
        state.memory[r.problem] = tuple(map(float, algo.remember(group, cfg)))


# --------------------------------------------------------------------------------------------------
# Learn


def learn(learner: Learner, batch: list[Trained], state: State, cfg) -> dict:
    """The update. A batch without a single kept rollout (all groups flat under grpo_skip, say) is
    no error: its row has no loss."""
    metrics = {}
    if batch:
        metrics = update(learner, batch, lr_at(state.step, cfg), cfg)
        skipped = metrics.pop("optim/skipped")
        state.skipped += skipped
        all_skipped = skipped == cfg.updates_per_batch
        state.skipped_in_a_row = state.skipped_in_a_row + skipped if all_skipped else 0
        if state.skipped_in_a_row >= BAD_STEPS:
            raise RunError(
                f"{state.skipped_in_a_row} updates in a row had a gradient that is not finite "
                f"(the last norm: {metrics['optim/grad_norm']}); the last checkpoint is good"
            )
    metrics["optim/skipped_steps"] = state.skipped
    return metrics


# --------------------------------------------------------------------------------------------------
# The run


class Inputs(NamedTuple):
    """What a run is made of, read and checked."""

    model_cfg: ModelConfig
    tokenizer: object
    reward: Reward
    problems: data.Problems
    held_out: dict[str, data.Problems]  # problems to evaluate on, by name

    def context(self, cfg) -> int:
        """Tokens of the longest prompt and response."""
        everything = itertools.chain(self.problems, *self.held_out.values())
        return cfg.max_new + max(len(problem.prompt) for problem in everything)


def prepare(cfg: Config) -> Inputs:
    """All that can be wrong with the input is found here: ValueError or OSError, one line."""
    aero.check_derivative(cfg.loss, cfg)
    reward = load_reward(cfg.reward)
    needs = aero.ALGORITHMS[cfg.algo].rewards
    if needs == "0 or 1" and reward.binary is False:
        raise ValueError(
            f"--algo {cfg.algo} needs rewards of 0 or 1, --reward {cfg.reward} gives others"
        )
    if cfg.model:
        folder = resolve(cfg.model)
        model_cfg = read_config(folder)
        with torch.device("meta"):
            find_weights(Model(model_cfg), folder)
        tokenizer = load_tokenizer(folder, model_cfg.vocab_size)
    else:
        tokenizer = character_tokenizer(cfg.base)
        model_cfg = base_config(cfg.base, tokenizer)
    room = model_cfg.max_position_embeddings - cfg.max_new
    if room < 1:
        raise ValueError(
            f"--max_new {cfg.max_new} leaves no room for a prompt in the model's context of "
            f"{model_cfg.max_position_embeddings} tokens"
        )

    def load(spec, limit):
        return data.load(spec, tokenizer, cfg.template, limit, max_prompt=room, reward=reward)

    problems = load(cfg.data, cfg.limit)
    held_out = {}
    for spec in filter(None, cfg.eval_data.split(",")):
        held = load(spec, cfg.eval_limit)
        held_out[eval.free_name(held.report.name, held_out)] = held
    return Inputs(model_cfg, tokenizer, reward, problems, held_out)


def evaluate(run: Run, step: int, inputs: Inputs, cfg, engine: Engine) -> dict[str, dict] | None:
    """{name: summary} of the policy after `step` steps; a set whose summary is on disk is not drawn
    again. None after a stop signal."""
    lead = dist.get_rank() == 0
    scores = {}
    for name, problems in inputs.held_out.items():
        path = run.folder / "eval" / f"{name}-step{step}.json"
        known = gather(read_json(path) if lead and path.is_file() else None)[0]
        if known:
            scores[name] = known
            continue
        summary, records = eval.evaluate(
            engine.sampler, engine.grader, engine.tokenizer, problems, cfg.eval_k, cfg.max_new,
            Sampling(cfg.temperature), cfg.seed, label=f"{name}, step {step}" if lead else "",
            stop=engine.stop,
        )  # fmt: skip
        if summary is None:
            return None
        source = dict(rows=problems.report.rows, revision=problems.report.revision)
        scores[name] = summary | dict(template=cfg.template, step=step) | source
        responses = list(itertools.chain(*gather(records)))
        responses.sort(key=lambda r: (r["problem"], r["sample"]))
        if lead:
            eval.save(path.parent, path.stem, responses, scores[name])
    return scores


def is_due(step: int, cfg) -> bool:
    return step % cfg.eval_every == 0 or step == cfg.steps


def eval_metrics(scores: dict[str, dict]) -> dict:
    metrics = {}
    for name, summary in scores.items():
        for key in ("avg_at_k", "pass_at_k"):
            if summary[key] is not None:
                metrics[f"eval/{name}/{key}"] = summary[key]
    return metrics


def start(cfg: Config, run: Run, inputs: Inputs, grader: Grader):
    """Base model, learner, sampler, the last checkpoint -> (learner, state, engine, log)."""
    device = start_ranks()
    torch.manual_seed(cfg.seed)  # nothing below draws from it; a fork that does is reproducible
    lead = dist.get_rank() == 0
    context = inputs.context(cfg)
    planned, kv_bytes = plan_memory(cfg, inputs.model_cfg, context, dist.get_world_size(), device)
    if lead and not cfg.model:
        base_model(cfg.base, Path(cfg.out), device)
    dist.barrier()
    folder = resolve(cfg.model) if cfg.model else base_model(cfg.base, Path(cfg.out), device)

    learner = make_learner(inputs.model_cfg, cfg, device, lambda model: read_weights(model, folder))
    ends = stop_ids(inputs.tokenizer, inputs.model_cfg.eos_token_ids)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sampler = Sampler(
        inputs.model_cfg, cfg.slots, context, ends, device, dtype, kv_gib=kv_bytes / 2**30
    )
    state = run.load(learner)
    before = run.saved_settings()
    log = Log(run.folder, state.step, cfg, dist.get_rank())
    if lead:
        run.write_settings(cfg)
    log.say(header(cfg, run.folder, inputs, learner.model, sampler, planned, device))
    if state.step:
        end = ", complete" if state.step == cfg.steps else ""
        log.say(f"resumed from {run.checkpoint(state.step)}: step {state.step} of {cfg.steps}{end}")
        log.say(changed_schedule(before, state.step, cfg))
    return learner, state, Engine(sampler, grader, inputs.tokenizer, Stop()), log


def changed_schedule(before: dict, step: int, cfg) -> str:
    """What another --steps does to a schedule that hangs on it; "" for one that does not."""
    old = replace(cfg, steps=before.get("steps", cfg.steps))
    if all(lr_at(done, old) == lr_at(done, cfg) for done in range(step)):
        return ""
    return (
        f"--steps {old.steps} -> {cfg.steps} changes the schedule: the {step} steps done had other "
        f"learning rates than it gives now; the next one is {lr_at(step, cfg):.3g}, not "
        f"{lr_at(step, old):.3g}"
    )


def train(cfg: Config, run: Run, inputs: Inputs, grader: Grader) -> None:
    learner, state, engine, log = start(cfg, run, inputs, grader)
    sampler, stop = engine.sampler, engine.stop
    dtype = sampler.dtype
    scores = {}
    sampler.load(full_weights(learner.model, dtype))
    if is_due(state.step, cfg):
        scores = evaluate(run, state.step, inputs, cfg, engine)
        if scores is not None:
            log.evaluation(state.step, eval_metrics(scores), scores)
    clock = Clock(sampler.device)

    while state.step < cfg.steps and scores is not None:
        # Sample and grade. The policy stands still, so a signal in here costs this step's rollouts.
        sampler.begin(stream(cfg.seed, "rollout", state.step), Sampling(cfg.temperature))
        grader.waited = 0.0
        groups, cursor = draw_step(inputs.problems, state, cfg, engine)
        clock.phase("rollout")
        clock.move(grader.waited, "rollout", "reward")
        if stop.asked_anywhere():
            break

        # Keep and weigh. Every rank gets the whole batch and takes its share of it: balanced
        # whatever the sizes of groups.
        batch, records = choose_batch(groups, state.step, cfg)
        remember(records, state, cfg)
        log.rollouts(state.step + 1, groups, records, inputs.tokenizer)
        metrics = describe(records, inputs.model_cfg, cfg, state.totals)
        clock.phase("other")

        # Learn.
        metrics |= learn(learner, batch, state, cfg)
        clock.phase("update")
        sampler.load(full_weights(learner.model, dtype))
        clock.phase("sync")
        state.step += 1
        state.cursor = cursor

        # Look and keep. The row is on disk before the checkpoint is, or a kill between them would
        # lose it: the time of saving belongs to the next row.
        if is_due(state.step, cfg):
            scores = evaluate(run, state.step, inputs, cfg, engine)
            metrics |= eval_metrics(scores or {})
        clock.phase("eval")
        metrics |= clock.read()
        metrics |= speeds(metrics, cfg, sampler.device, dist.get_world_size())
        log.step(state.step, metrics, scores)
        clock = Clock(sampler.device)
        if state.step % cfg.save_every == 0 or state.step == cfg.steps:
            run.save(state, learner)
        clock.phase("save")

    log.close()
    if state.step < cfg.steps or scores is None:
        run.save(state, learner)
        log.say(
            f"stopped by a signal at step {state.step} of {cfg.steps}; "
            "the same command goes on from there"
        )
        return
    lead = dist.get_rank() == 0
    card = report.model_card(run.folder, state, cfg, inputs, versions()) if lead else ""
    run.export(learner, inputs.tokenizer, card)
    if lead:
        log.say(report.close_run(run.folder, state.totals, cfg))


def main(argv=None, config=Config) -> int:
    """config: a dataclass of more knobs than Config's, for a fork that has some."""
    lead = os.environ.get("RANK", "0") == "0"
    try:
        cfg = parse(config, sys.argv[1:] if argv is None else argv, __doc__)
        run = Run.open(cfg)
        inputs = prepare(cfg)
        run.folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        if lead:
            print(f"error: {error}", file=sys.stderr)
        return 2
    grader = Grader(cfg.reward, cfg.graders)  # its processes start before CUDA does
    try:
        train(cfg, run, inputs, grader)
    except torch.OutOfMemoryError as error:
        print(
            f"error: {str(error).splitlines()[0]}; smaller --micro_tokens or --slots, "
            "--checkpoint_activations True and --reshard True need less, and the last checkpoint "
            "is good",
            file=sys.stderr,
        )
        return 2
    except MemoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        if lead:
            print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        grader.close()
    # Ranks leave together, since gloo may abort one whose peers are still at work. Not after an
    # error: the other ranks would be waited for.
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
