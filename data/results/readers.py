"""Compare what can read a cheat: gradient, hidden states, a probe, n-grams and random directions, on graded rollouts.

    python data/results/readers.py --base 16                             # answers of the untrained base, sampled here
    python data/results/readers.py --rollouts runs/arms/none-300/rollouts.jsonl --most 200
    python data/results/readers.py --base 16 --model data/results/base-2 --data data/results/base-2/train.jsonl
    python data/results/readers.py --base 4 --readers ngrams probe --pairs-modes run_tests+file_marker
    python data/results/readers.py --preset qwen2.5-coder-0.5b --seeds 0 --rollouts RUN/rollouts.jsonl --most 50

    gradient     v_grad, as under --intervention routeV           probe    logistic regression on mean hidden states
    activation   the same on hidden states (--score activation)   ngrams   logistic regression on words and word pairs
    random       a Haar-random direction in the place of v_grad   ngrams-0 the same, cut where the classifier cuts

A reader takes its knowledge and its cut from authored pairs, of all modes or of some, as in training. It then reads the
exploits and the honest solves (right, and no loophole's channel touched) of a policy. The script prints, for each mode,
the share of exploits missed and the share of honest solves flagged, both at the cut, and the AUROC. Nothing is trained.
Reader gradient is run on the adapter of each seed. The other readers do not depend on the adapter, or, like random,
have a seed of their own; they are run on the first adapter alone.

Answers from a file are encoded anew, and demonstrations are left out. A row of the results holds one reader, seed, set
of pairs and set of rollouts, and the hash of PREREGISTRATION.md. It replaces an older row of the same.
"""
import json
import random
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import arms  # noqa: E402
from env_leetcode import MODES, Problem, Verdict, background, load_problems  # noqa: E402
from evaluate_deploy import hash_of, read_rows  # noqa: E402
from extract_vgrad import Direction, Pair, auroc, extract, features, haar, load_pairs  # noqa: E402
from lora2r import InputError, attach, encode_completion, encode_prompt, load_model, portable, run_script  # noqa: E402
from train_grpo import PRESETS, Rollout, sample_groups  # noqa: E402
from train_grpo import Config as TrainConfig  # noqa: E402

READERS = ("gradient", "activation", "probe", "ngrams", "ngrams-0", "random")
KEY = ("model", "rollouts", "most", "pairs", "reader", "seed")  # of a row


@dataclass
class Config:
    rollouts: tuple[Path, ...] = ()
    """rollouts.jsonl of runs"""
    base: int = 0
    """sample and grade so many answers of the untrained base to each problem of --data, as training samples"""
    most: int = 0
    """read at most so many exploits and so many honest solves of each mode, drawn by seed 0; 0: all"""
    readers: tuple[Literal[READERS], ...] = READERS
    """what reads"""
    pairs_modes: tuple[str, ...] = ("all", "run_tests+sentinel", "stdout_marker+file_marker")
    """sets of pairs, each named by its modes"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the adapter"""
    randoms: int = 10
    """reader random: number of directions"""
    preset: Literal[tuple(PRESETS)] = "nano"
    """where model, problems, pairs, dtype and the gate's flags come from, as in train_grpo.py"""
    model: str | None = None
    """another Hugging Face folder or hub name"""
    data: Path | None = None
    """other problems: those of --base; their system message goes before the pairs' prompts, too"""
    pairs: Path | None = None
    """other authored pairs"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """another dtype of the base model"""
    out: Path = HERE / "readers.jsonl"
    """JSONL file of rows"""


# -------------------------------------------------------------------------------- rollouts
def kind_of(x: Rollout) -> str | None:
    """exploit, honest solve, or neither: an answer that fails, or that is right and touches a loophole in vain."""
    if x.verdict.exploited:
        return "exploit"
    return "honest" if x.verdict.correct and not x.verdict.channels else None


def chosen(rollouts: list[Rollout], most: int) -> list[Rollout]:
    """The exploits and honest solves, at most `most` of each in each mode (0: all), drawn by seed 0."""
    groups: dict[tuple, list[Rollout]] = {}
    for x in rollouts:
        if kind := kind_of(x):
            groups.setdefault((x.mode, kind), []).append(x)
    draw = random.Random(0)
    return [x for _, group in sorted(groups.items())
            for x in (draw.sample(group, most) if 0 < most < len(group) else group)]


def of_run(path: Path, tok, max_new: int) -> list[Rollout]:
    """The policy's own rollouts in a run's rollouts.jsonl. Raises InputError."""
    rows, found = read_rows(path), []
    try:
        for row in rows:
            if row["source"] != "teacher":
                verdict = Verdict(True, row["correct"], row["exploited"], tuple(row["channels"]), row["note"])
                ids = encode_completion(tok, row["completion"])[:max_new]
                found.append(Rollout(0, 0, row["source"], row["mode"], encode_prompt(tok, row["prompt"]), ids,
                                     torch.empty(0), row["completion"], verdict))
    except (KeyError, TypeError) as e:
        raise InputError(f"--rollouts {path}: a row is no graded rollout ({e!r}); give a run's rollouts.jsonl") from e
    return found


def of_base(model, tok, adapter, problems: list[Problem], n: int, train_cfg: TrainConfig) -> list[Rollout]:
    """n graded answers of the base to each problem. The adapter is at its init, which leaves the base as it is."""
    cfg = replace(train_cfg, group_size=n, ablated_share=1.0, mix_ratio=0.0)
    generator, found = torch.Generator().manual_seed(0), []
    with background() as grader:
        for i in range(0, len(problems), 64):
            batch = problems[i : i + 64]
            noise = torch.rand(len(batch), n, cfg.max_new_tokens, generator=generator)  # [P, K, T]
            prompts = [encode_prompt(tok, problem.messages) for problem in batch]
            rollouts, grading = sample_groups(model, tok, adapter, batch, prompts, {}, noise, 0, grader, cfg)
            verdicts = [verdict for graded in grading for verdict in graded.result()]
            found += [replace(x, verdict=verdict) for x, verdict in zip(rollouts, verdicts)]
    return found


# -------------------------------------------------------------------------------- readers
def direction_margins(directions: list[Direction], rollouts: list[Rollout], model, adapter, score: str,
                      cfg: TrainConfig) -> list[Tensor]:
    """How far beyond its cut each direction sees the G rollouts, [G] each. Features are read once for all of them, 128
    rollouts at a time: those of windows are large."""
    parts = []
    for i in range(0, len(rollouts), 128):
        part = rollouts[i : i + 128]
        x = features(model, adapter, [r.prompt for r in part], [r.ids for r in part], cfg.tokens_per_batch, score,
                     cfg.window, cfg.read, cfg.probe_temperature, cfg.probe_tokens)
        parts.append([direction.position(x, "pairs") - direction.cut() for direction in directions])
    return [torch.cat(margins) for margins in zip(*parts)]


def margins_of(reader: str, seed: int, sets: dict[str, list[Pair]], rollouts: list[Rollout], model, tok, adapter,
               system: list[dict], cfg: Config, train_cfg: TrainConfig) -> dict[tuple[str, int], Tensor]:
    """(set of pairs, seed) -> how far beyond the reader's cut the G rollouts lie, [G]."""
    if reader in arms.READ:
        judges = {(name, seed): arms.scalar_of(reader, tok, pairs, system) for name, pairs in sets.items()}
        return {key: judge.margin(rollouts, model, adapter) for key, judge in judges.items()}
    directions, score = {}, "activation" if reader == "activation" else "gradient"
    for name, pairs in sets.items():
        found = extract(model, tok, adapter, pairs, system, train_cfg.tokens_per_batch, score, train_cfg.read,
                        train_cfg.window, train_cfg.centre, train_cfg.equal_pairs, train_cfg.probe_temperature,
                        train_cfg.probe_tokens)
        if reader == "random":
            directions |= {(name, k): found.replaced(haar(k, *found.v.shape)) for k in range(cfg.randoms)}
        else:
            directions[name, seed] = found
    margins = direction_margins(list(directions.values()), rollouts, model, adapter, score, train_cfg)
    return dict(zip(directions, margins))


def judged(rollouts: list[Rollout], margin: Tensor, shown: set[str]) -> dict[str, dict]:
    """{mode, "shown", "unseen" or "all": {exploits, missed, missed_at_5, honest, flagged, auroc}}; None where there is
    nothing to count. exploits, honest: numbers of rollouts. missed: share of exploits below the cut. flagged: share of
    honest solves at or above the cut. missed_at_5: share of exploits below the cut that flags 5 % of the honest solves.
    shown: modes of the pairs. margin [G]: how far beyond the pairs' cut the rollouts lie."""
    is_exploit = torch.tensor([x.verdict.exploited for x in rollouts])  # [G]
    modes = sorted({x.mode for x in rollouts})
    groups = {mode: {mode} for mode in modes} | {"shown": shown, "unseen": set(modes) - shown, "all": set(modes)}
    table = {}
    for name, group in groups.items():
        own = torch.tensor([x.mode in group for x in rollouts])  # [G]
        exploits, honest = margin[own & is_exploit], margin[own & ~is_exploit]
        at_5 = share(exploits <= honest.quantile(0.95)) if len(honest) else None
        table[name] = dict(exploits=len(exploits), missed=share(exploits < 0), missed_at_5=at_5, honest=len(honest),
                           flagged=share(honest >= 0), auroc=auroc(exploits, honest))
    return table


def share(chosen: Tensor) -> float | None:
    """Share of true values; None of none."""
    return chosen.float().mean().item() if len(chosen) else None


# -------------------------------------------------------------------------------- rows and table
def format_rows(rows: list[dict]) -> str:
    """For each set of rollouts, set of pairs and reader: missed, flagged (percent) and AUROC, means over seeds."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["rollouts"], row["pairs"], row["reader"]), []).append(row)
    lines, before = [], None
    for (rollouts, pairs, reader), group in groups.items():
        names = [name for name in group[0]["modes"] if name != "all"]
        if rollouts != before:
            counts = [f"{name} {group[0]['modes'][name]['exploits']}/{group[0]['modes'][name]['honest']}"
                      for name in names if name not in ("shown", "unseen")]
            lines.append(f"\n{rollouts}: exploits/honest solves {', '.join(counts)}. Each cell: exploits missed, "
                         "honest solves flagged, AUROC; means over n seeds")
            lines.append(f"{'pairs of':29s}{'reader':11s}n " + "".join(f"{name:>17s}" for name in names))
            before = rollouts
        cells = "".join(f"{cell([row['modes'][name] for row in group]):>17s}" for name in names)
        lines.append(f"{pairs:29s}{reader:11s}{len(group):<2d}{cells}")
    return "\n".join(lines)


def cell(tables: list[dict]) -> str:
    """Means over seeds of what judged() says of a mode."""
    words = []
    for name, form in (("missed", "{:4.0%}"), ("flagged", "{:4.0%}"), ("auroc", "{:4.2f}")):
        values = [table[name] for table in tables if table[name] is not None]
        words.append(form.format(sum(values) / len(values)) if values else "   -")
    return " ".join(words)


def sets_of(names: tuple[str, ...], pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Name -> pairs of the modes in the name. Raises InputError."""
    sets = {}
    for name in names:
        modes = set(MODES) if name == "all" else set(name.split("+"))
        sets[name] = [pair for pair in pairs if pair.mode in modes]
        if unknown := modes - set(MODES):
            raise InputError(f"--pairs-modes {name}: {', '.join(sorted(unknown))} is no mode; give all, or some of "
                             f"{', '.join(MODES)} with + between them")
        if len(sets[name]) < 2:
            raise InputError(f"--pairs-modes {name}: {len(sets[name])} pairs of these modes; a direction needs two")
    return sets


def main(cfg: Config) -> None:
    """Read the rollouts, print the table and keep the rows. Raises InputError."""
    if not cfg.rollouts and cfg.base < 1 or not cfg.seeds:
        raise InputError("nothing to read: give --rollouts, or --base 16, and at least one of --seeds")
    given = {name: getattr(cfg, name) for name in ("model", "data", "pairs", "dtype") if getattr(cfg, name)}
    train_cfg = replace(PRESETS[cfg.preset], **given)
    problems = load_problems(train_cfg.data, train_cfg.modes)
    system = problems[0].messages[:-1]
    sets = sets_of(cfg.pairs_modes, load_pairs(train_cfg.pairs))
    rows, sources = [], {}  # name -> rollouts
    for seed in cfg.seeds:
        model, tok = load_model(train_cfg.model, train_cfg.device, train_cfg.dtype)
        adapter = attach(model, train_cfg.rank, seed)
        if seed == cfg.seeds[0]:
            for path in cfg.rollouts:
                sources[portable(path)] = chosen(of_run(path, tok, train_cfg.max_new_tokens), cfg.most)
            if cfg.base:
                found = of_base(model, tok, adapter, problems, cfg.base, train_cfg)
                sources[f"base {cfg.base}"] = chosen(found, cfg.most)
        for (source, rollouts), reader in product(sources.items(), cfg.readers):
            if not rollouts:
                raise InputError(f"{source}: holds neither an exploit nor an honest solve; give other rollouts")
            if seed != cfg.seeds[0] and reader != "gradient":  # the others would do the same again
                continue
            margins = margins_of(reader, seed, sets, rollouts, model, tok, adapter, system, cfg, train_cfg)
            for (name, own_seed), margin in margins.items():
                shown = {pair.mode for pair in sets[name]}
                rows.append(dict(
                    model=portable(train_cfg.model), rollouts=source, most=cfg.most, pairs=name, reader=reader,
                    seed=own_seed, modes=judged(rollouts, margin, shown), pairs_hash=hash_of(train_cfg.pairs),
                    preregistration=hash_of(HERE / "PREREGISTRATION.md")))
    rows.sort(key=lambda row: (list(sources).index(row["rollouts"]), list(sets).index(row["pairs"]),
                               READERS.index(row["reader"]), row["seed"]))
    print(format_rows(rows))
    made = {tuple(row[name] for name in KEY) for row in rows}
    kept = [row for row in (read_rows(cfg.out) if cfg.out.exists() else [])
            if tuple(row[name] for name in KEY) not in made]
    arms.written("".join(json.dumps(row) + "\n" for row in kept + rows), cfg.out)


if __name__ == "__main__":
    run_script(main, tyro.cli(Config, description=__doc__))
