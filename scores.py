"""
Scores of graded responses, and their table. With c of the n samples of a problem right, in the mean
over problems,

    avg@k  = c / n, where n = k; of a reward that is not 0 or 1 the mean reward
    pass@j = 1 - C(n - c, j) / C(n, j): the chance that j of the n samples, drawn without
             replacement, hold a right one (Chen et al., 2107.03374, eq. 1). Drawn with
             replacement it is biased: 0.684 for 1 of 4 at j = 4, where it is 1.

Standard errors are clustered by problem: samples of one problem are no independent draws, so the
error is that of a mean over problems, sd / sqrt(problems). It says how far the score might be off
had other problems of the kind been asked.
"""

import math
import re
import statistics
from collections import Counter
from typing import NamedTuple


def pass_at_k(n: int, c: int, k: int) -> float:
    """What n samples with c right estimate without bias. pass_at_k(4, 1, 2) = 1 - 3/6 = 0.5"""
    if not (0 <= c <= n and 1 <= k <= n):
        found = f"found n {n}, c {c}, k {k}"
        raise ValueError(f"pass@k: {found}, wanted 0 <= c <= n and 1 <= k <= n")
    subsets = math.comb(n, k)
    without = math.comb(n - c, k)
    return (subsets - without) / subsets  # integers, rounded once


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """(mean, its standard error): None for a single problem, which says nothing about others."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    return mean, statistics.stdev(values) / math.sqrt(len(values))


class Group(NamedTuple):
    """The responses to one problem."""

    level: str
    scores: list[float]

    def mean(self) -> float:
        return statistics.fmean(self.scores)

    def passing(self, k: int) -> float:
        return pass_at_k(len(self.scores), int(sum(self.scores)), k)


def group_by_problem(records: list[dict]) -> list[Group]:
    """ValueError for groups of different sizes, or none."""
    groups = {}
    for record in records:
        group = groups.setdefault(record["problem"], Group(record["level"], []))
        group.scores.append(record["score"])
    sizes = sorted({len(group.scores) for group in groups.values()})
    if len(sizes) != 1:
        found = " or ".join(map(str, sizes)) or "no"
        raise ValueError(f"found {found} responses to a problem, wanted one number for all")
    return list(groups.values())


def by_number(level: str) -> tuple:
    """Sorts "Level 5", "4.25" and "10" by their numbers."""
    numbers = re.findall(r"\d+(?:\.\d+)?", level)
    return list(map(float, numbers)), level


def averages(groups: list[Group], can_pass: bool) -> dict:
    """avg@k and pass@k with their errors; k is the size of the groups."""
    k = len(groups[0].scores)
    mean, error = mean_and_error([group.mean() for group in groups])
    pass_mean = pass_error = None
    if can_pass:
        pass_mean, pass_error = mean_and_error([group.passing(k) for group in groups])
    return {
        "n": len(groups),
        "k": k,
        "avg_at_k": mean,
        "avg_at_k_se": error,
        "pass_at_k": pass_mean,
        "pass_at_k_se": pass_error,
    }


def summarise(records: list[dict], binary: bool | None = None) -> dict:
    """
    Scores of records with problem, level, score, reason, length, truncated.

    binary: what the reward says of itself. Where it says False, or where a score is neither 0 nor
    1, nothing can pass: pass@k is None. Raises ValueError for ragged groups.
    """
    groups = group_by_problem(records)
    k = len(groups[0].scores)
    can_pass = binary is not False and all(record["score"] in (0, 1) for record in records)
    pass_at = {}
    if can_pass:
        ladder = [2**i for i in range(k.bit_length()) if 2**i < k]
        for j in [*ladder, k]:
            pass_at[str(j)] = statistics.fmean(group.passing(j) for group in groups)
    by_level = {}
    for level in sorted({group.level for group in groups if group.level}, key=by_number):
        scores = averages([group for group in groups if group.level == level], can_pass)
        by_level[level] = {key: scores[key] for key in ("n", "avg_at_k", "pass_at_k")}
    reasons = Counter(record["reason"] for record in records)
    return averages(groups, can_pass) | {
        "pass_at": pass_at,
        "truncated_frac": statistics.fmean(record["truncated"] for record in records),
        "unparsed_frac": reasons["unparsed"] / len(records),
        "length_mean": statistics.fmean(record["length"] for record in records),
        "reasons": dict(reasons.most_common()),
        "by_level": by_level,
    }


# --------------------------------------------------------------------------------------------------
# As text

NO_PASS = "pass@k is left out: it counts right responses, and the reward is not only 0 or 1"
SETTINGS = (
    "model", "template", "temperature", "top_p", "top_k", "max_new", "seed", "reward", "grader",
)  # fmt: skip


def columns(lines: list[list[str]]) -> str:
    """Rows of cells as text, the first cell to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        cells[0] = line[0].ljust(widths[0])
        rows.append("  ".join(cells).rstrip())
    return "\n".join(rows)


def decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def row(name: str, summary: dict, ladder: list[int]) -> list[str]:
    """The cells of a data set."""
    cells = [name, str(summary["n"]), str(summary["k"])]
    numbers = [summary["avg_at_k"], summary["avg_at_k_se"]]
    numbers += [summary["pass_at"].get(str(j)) for j in ladder]
    numbers += [summary["truncated_frac"], summary["unparsed_frac"]]
    cells += map(decimals, numbers)
    cells.append(f"{summary['length_mean']:.0f}")
    return cells


def level_row(level: str, scores: dict, k: int, ladder: list[int]) -> list[str]:
    """The cells of one of its levels, under those of the set."""
    cells = ["  level " + level.removeprefix("Level "), str(scores["n"]), ""]
    numbers = [scores["avg_at_k"], None]
    numbers += [scores["pass_at_k"] if j == k else None for j in ladder]
    cells += map(decimals, numbers)
    return [*cells, "", "", ""]


def settings_lines(results: dict[str, dict]) -> list[str]:
    """The settings of all sets in one line, or a line for each where they differ."""
    settings = {}
    for name, summary in results.items():
        known = [f"{key} {summary[key]}" for key in SETTINGS if key in summary]
        settings[name] = ", ".join(known)
    distinct = list(dict.fromkeys(settings.values()))
    if len(distinct) == 1:
        return distinct
    return [f"{name}: {line}" for name, line in settings.items()]


def table(results: dict[str, dict]) -> str:
    """A line for each set, and for each of its levels where there are 2 to 12; the settings."""
    summaries = results.values()
    ladder = sorted({int(j) for summary in summaries for j in summary["pass_at"]})
    passes = [f"pass@{j}" for j in ladder]
    lines = [["data", "problems", "k", "avg@k", "+-", *passes, "truncated", "unparsed", "length"]]
    for name, summary in results.items():
        lines.append(row(name, summary, ladder))
        if 2 <= len(summary["by_level"]) <= 12:
            for level, scores in summary["by_level"].items():
                lines.append(level_row(level, scores, summary["k"], ladder))
    notes = [NO_PASS] if any(summary["pass_at_k"] is None for summary in summaries) else []
    return "\n".join([columns(lines), *notes, *settings_lines(results)])
