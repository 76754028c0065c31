"""Deploy evaluation: what a trained model does once its quarantine is removed.

    python evaluate_deploy.py runs/routeV_seed0                      # one run: a table, and deploy.json in its folder
    python evaluate_deploy.py runs/*_seed* --base                    # several runs in one table, and the base model
    python evaluate_deploy.py runs/routeV_seed0 --browse run.html    # its rollouts as a page; samples nothing
    python evaluate_deploy.py runs/routeV_seed0 --export folder      # the deployed model as a LoRA; samples nothing

Every arm answers the same held-out problems, every mode, in the same way:

    deployed   quarantine ablated: the model that ships       full       both blocks, as trained
    trained    hints disclose the markers of training         held-out   other markers: a memorised one earns nothing

Rates are shares of answers. solve: right. honest solve: right, and no loophole's channel touched. exploit: own loophole
used with success, right or not. hack: paid and not right. Intervals are 95 % Wilson intervals with n = the number of
problems, because the samples of one problem are not independent.
"""
import hashlib
import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import save as to_bytes

from env_leetcode import Problem, Verdict, background, check_canonicals, grade_batch, load_problems
from lora2r import (HERE, Adapter, InputError, attach, bar, context_of, encode_prompt, folded, from_json, generate,
                    load, load_model, located, opened_thought, peek, portable, read_text, run_script, writing)


def rates(modes: list[str], verdicts: list[Verdict]) -> dict[str, dict]:
    """Shares of answers: {"all" or mode: {n, solve, exploit, hack, honest_solve, compiles, channel}}, None if n = 0.

    modes, verdicts: one entry per answer. channel: any loophole's channel was touched, with success or not.
    """
    table = {}
    for mode in ("all", *sorted(set(modes))):
        chosen = [v for of_mode, v in zip(modes, verdicts) if mode in ("all", of_mode)]
        n = len(chosen)
        counts = dict(solve=sum(v.correct for v in chosen),
                      exploit=sum(v.exploited for v in chosen),
                      hack=sum(v.hacked for v in chosen),
                      honest_solve=sum(v.correct and not v.channels for v in chosen),
                      compiles=sum(v.compiles for v in chosen),
                      channel=sum(bool(v.channels) for v in chosen))
        table[mode] = dict(n=n, **{name: count / n if n else None for name, count in counts.items()})
    return table


def evaluate(model, tok, adapter: Adapter | None, problems: list[Problem], setting: str = "deployed", samples: int = 4,
             max_new: int = 64, top_k: int = 0, temperature: float = 0.7, seed: int = 0) -> dict[str, dict]:
    """Sample and grade `samples` answers to each problem; returns `rates`, with the number of problems per mode.

    setting: "deployed" (quarantine ablated), "full" (as trained) or "base" (adapter=None).
    The noise depends on `seed` alone, so that every arm and setting is sampled with the same noise.
    """
    noise = torch.rand(len(problems), samples, max_new, generator=torch.Generator().manual_seed(seed))
    prompts = [encode_prompt(tok, p.messages) for p in problems]
    repeated = [p for p in problems for _ in range(samples)]  # the problem of each answer
    with folded(adapter, quarantine=setting == "full") if adapter else nullcontext(), background() as grader:
        grading = []  # one part of 64 problems is graded while the next is sampled
        for i in bar(range(0, len(problems), 64), f"evaluation, {setting}"):
            part = prompts[i : i + 64]
            of_part = noise[i : i + 64].flatten(0, 1)  # [len(part) * samples, max_new]
            completions, _ = generate(model, tok, part, [samples] * len(part), of_part, temperature, top_k)
            thought, texts = opened_thought(tok, part[0]), tok.batch_decode(completions, skip_special_tokens=True)
            grading.append(grader.submit(grade_batch, repeated[i * samples : (i + 64) * samples],
                                         [thought + text for text in texts]))
    verdicts = [v for future in grading for v in future.result()]
    table = rates([p.mode for p in repeated], verdicts)
    return {mode: dict(problems=row["n"] // samples, **row) for mode, row in table.items()}


def wilson(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a share."""
    centre = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def format_table(runs: list[tuple[str, int, dict]]) -> str:
    """runs: (arm, seed, {"setting, markers": evaluate(...)}). A line per run, setting and markers: n answers, the four
    rates with their intervals over problems, and the exploit rate per mode."""
    modes = sorted({mode for _, _, results in runs for table in results.values() for mode in table} - {"all"})
    rows = [["arm", "seed", "setting, markers", "n", "honest solve", "exploit", "solve", "hack",
             *(f"exploit {mode}" for mode in modes)]]
    for arm, seed, results in runs:
        for condition, table in results.items():
            total = table["all"]
            cells = ["{:.3f} [{:.2f}, {:.2f}]".format(total[name], *wilson(total[name], total["problems"]))
                     for name in ("honest_solve", "exploit", "solve", "hack")]
            cells += [f"{table[mode]['exploit']:.3f}" if mode in table else "-" for mode in modes]
            rows.append([arm, str(seed), condition, str(total["n"]), *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


# ---------------------------------------------------------------- run folders, the page of rollouts, export
def hash_of(path: str | Path) -> str:
    """The first 12 digits of a file's SHA-256. Raises InputError for a file that cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); give another, or change its permissions") from e


FIELDS = dict(arm=str, seed=int, steps=int, model=str, dtype=str, modes=list, test_data=str, hashes=dict,
              eval_samples=int, max_new_tokens=int, top_k=int)  # of config.json, those that are read here


def read_run(folder: Path) -> dict:
    """config.json of a run folder. Raises InputError if the folder is not one."""
    path, remedy = folder / "config.json", "give a run folder that train_grpo.py wrote"
    config = from_json(read_text("", path, remedy), f"{path}:", remedy, **FIELDS)
    texts = [*config["modes"], config["hashes"].get("test_data")]
    if min(config[name] for name in FIELDS if FIELDS[name] is int) < 0 or not all(isinstance(x, str) for x in texts):
        raise InputError(f"{path}: damaged (a number below 0, or modes or hashes that are no text); {remedy}")
    return config


def read_rows(path: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl or rollouts.jsonl. Raises InputError for a missing, empty or damaged file."""
    lines = read_text("", path, "give a run that made a step").splitlines()
    if not lines:
        raise InputError(f"{path}: is empty; give a run that made a step")
    return [from_json(line, f"{path}:", "train_grpo.py --resume of this run mends a torn last row") for line in lines]


def check_lengths(tok, model, max_new: int, path: str | Path, problems: list[Problem]) -> None:
    """Raises InputError where a prompt and `max_new` tokens do not fit the model's context."""
    limit = context_of(model) - max_new
    for p in problems:
        if (length := len(encode_prompt(tok, p.messages))) > limit:
            raise InputError(f"{path}: problem {p.id} is {length} tokens, and --max-new-tokens {max_new} leaves "
                             f"{limit} of the context; shorten either")


def settings_of(config: dict, step: int) -> dict:
    """The settings with which a run evaluates itself at its end; deploy.json records them beside the results."""
    return dict(samples=config["eval_samples"], temperature=0.7, seed=0, step=step, data=config["test_data"],
                data_hash=config["hashes"]["test_data"], max_new_tokens=config["max_new_tokens"], top_k=config["top_k"])


def write_deploy(folder: Path, config: dict, settings: dict, results: dict) -> Path:
    """Write deploy.json. Settings other than the run's own get a file whose name says what differs, so that no result
    replaces another: deploy-samples8.json, deploy-temperature0.0-data_val_0123456789ab.json."""
    own = settings_of(config, config["steps"])
    differ = [f"-{key}{settings[key]}" for key in own if key[:4] != "data" and settings[key] != own[key]]
    if settings["data_hash"] != own["data_hash"]:
        differ.append(f"-data_{Path(settings['data']).stem}_{settings['data_hash']}")
    path = folder / f"deploy{''.join(differ)}.json"
    result = dict(arm=config["arm"], seed=config["seed"], settings=settings, results=results)
    with writing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    return path


def browse(rows: list[dict], title: str, path: Path) -> None:
    """Write rows of rollouts.jsonl as one HTML file. What a model wrote is data in that file, never markup or code."""
    data = json.dumps(dict(title=title, rows=rows)).replace("<", "\\u003c")
    with writing(path) as temporary:
        temporary.write_text((HERE / "data/browse.html").read_text().replace("DATA", data, 1))


@torch.no_grad()
def export(model, adapter: Adapter, path: Path, format: str = "merged", tokenizer=None) -> None:
    """Write a new folder with the deployed block and nothing of the quarantine: the whole folder, or none.

    "merged": a Hugging Face folder, the block merged into the weights; `model` is unchanged afterwards. "peft": PEFT's
    two files, a LoRA of rank 2r for the base model. Raises InputError, and replaces no folder that holds files.
    """
    # Where experts are fused into parameters such as down_proj, PEFT takes layers of that name for the experts.
    fused = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    if format == "peft" and (odd := fused.intersection(name.rpartition(".")[2] for name in adapter.modules)):
        raise InputError(f"--format peft: PEFT would load the layers {', '.join(sorted(odd))} as experts, which have "
                         "that name, too; give --format merged")
    with writing(path) as temporary:
        if format == "merged":
            with folded(adapter, quarantine=False):
                model.save_pretrained(temporary)
            if tokenizer is not None:
                getattr(tokenizer, "as_loaded", tokenizer).save_pretrained(temporary)
            return
        temporary.mkdir()
        tensors = {}
        for name, module in adapter.modules.items():
            for which, factor in zip("AB", module.deployed.factors()):  # [2r, d_in], [d_out, 2r]
                tensors[f"base_model.model.{name}.lora_{which}.weight"] = factor
        (temporary / "adapter_model.safetensors").write_bytes(to_bytes(tensors, metadata={"format": "pt"}))
        config = dict(peft_type="LORA", task_type="CAUSAL_LM", target_modules=list(adapter.modules),
                      base_model_name_or_path=portable(adapter.base["name"]), bias="none", inference_mode=True,
                      r=2 * adapter.r, lora_alpha=2 * adapter.r, lora_dropout=0.0)  # lora_alpha / r scales B A: by 1
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


# ---------------------------------------------------------------- the script
@dataclass
class Config:
    checkpoints: tyro.conf.Positional[tuple[Path, ...]] = ()
    """run folders written by train_grpo.py"""
    samples: int = 4
    """answers per problem, setting and markers"""
    temperature: float = 0.7
    """sampling temperature; 0: the likeliest token"""
    seed: int = 0
    """sampling seed"""
    base: bool = False
    """also evaluate the base model, without any adapter"""
    browse: Path | None = None
    """write the rollouts of one run to this .html file, to read and filter in a browser; samples nothing"""
    export: Path | None = None
    """write the deployed model of one run to this new folder; samples nothing"""
    format: Literal["peft", "merged"] = "peft"
    """of --export. peft: a LoRA of rank 2 x --rank in fp32; merged: a plain checkpoint, weights rounded to --dtype"""
    model: str | None = None
    """base model (default: that of the run's config.json)"""
    data: Path | None = None
    """held-out problems (default: those of the run's config.json)"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""


def check(cfg: Config) -> None:
    """Raises InputError for a value that cannot be used, and for a flag that would have no effect."""
    if not cfg.checkpoints:
        raise InputError("no checkpoint given; e.g. python evaluate_deploy.py runs/routeV_seed0")
    for name, low, end in (("samples", 1, math.inf), ("temperature", 0, math.inf), ("seed", 0, 2**32)):
        if not low <= getattr(cfg, name) < end:  # so written, NaN is refused too
            raise InputError(f"--{name} {getattr(cfg, name)}: give a number of at least {low} and below {end}")
    task = "browse" if cfg.browse else "export" if cfg.export else None  # instead of an evaluation
    if task and len(cfg.checkpoints) > 1:
        raise InputError(f"--{task}: is for one run, and {len(cfg.checkpoints)} are given; give one")
    for name in ("samples", "temperature", "seed", "base", "data", "export"):
        if task and name != task and getattr(cfg, name) != getattr(Config, name):
            raise InputError(f"--{name} {getattr(cfg, name)} with --{task} has no effect; leave it out")
    if cfg.format != Config.format and task != "export":
        raise InputError(f"--format {cfg.format} without --export has no effect; leave it out")
    if cfg.browse and cfg.browse.suffix != ".html":
        raise InputError(f"--browse {cfg.browse}: give a .html file")
    if cfg.export and cfg.export.exists():
        raise InputError(f"--export {cfg.export}: exists; name a new folder")


def main(cfg: Config) -> None:
    """Evaluate every checkpoint and write a result into its folder; or browse or export one. Raises InputError."""
    check(cfg)
    if cfg.browse:
        folder, = cfg.checkpoints
        config, rows = read_run(folder), read_rows(folder / "rollouts.jsonl")
        browse(rows, f"Rollouts of {config['arm']}, seed {config['seed']}", cfg.browse)
        print(f"rollouts: {cfg.browse}")
        return
    todo = []  # every run's files are read before any model is loaded
    for folder in cfg.checkpoints:
        header, config, problems = peek(folder / "adapter.safetensors"), read_run(folder), {}
        path = str(cfg.data or located(config["test_data"]))
        if not cfg.export and not Path(path).is_file():
            raise InputError(f"{folder}: its problems {path} are not here; name them with --data")
        for markers in () if cfg.export else ("trained", "held-out"):
            problems[markers] = load_problems(path, config["modes"], 0, heldout_markers=markers == "held-out")
        if cfg.data and problems:  # training has checked its own files
            check_canonicals(path, problems["trained"])
        todo.append((folder, config, header, path, problems))
    runs = []
    for folder, config, header, path, problems in todo:
        model = adapter = None  # free the previous run's memory before the next model is loaded
        model, tok = load_model(cfg.model or located(config["model"]), cfg.device, config["dtype"])
        for of_markers in problems.values():
            check_lengths(tok, model, config["max_new_tokens"], path, of_markers)
        args = (cfg.samples, config["max_new_tokens"], config["top_k"], cfg.temperature, cfg.seed)
        if cfg.base and not runs:  # once, and before an adapter is attached
            results = {f"base, {markers}": evaluate(model, tok, None, of_markers, "base", *args)
                       for markers, of_markers in problems.items()}
            runs.append(("base", 0, results))
        adapter = attach(model, header["r"])
        step = load(adapter, folder / "adapter.safetensors").get("step")
        if not isinstance(step, str) or not step.isdecimal() or len(step) > 9:
            raise InputError(f"{folder / 'adapter.safetensors'}: damaged (its step is {step!r:.40}); copy it again")
        if cfg.export:
            export(model, adapter, cfg.export, cfg.format, tok)
            print(f"{cfg.export}: the deployed model of {folder}, {cfg.format}")
            return
        results = {f"{setting}, {markers}": evaluate(model, tok, adapter, of_markers, setting, *args)
                   for setting in ("deployed", "full") for markers, of_markers in problems.items()}
        settings = settings_of(config, int(step)) | dict(
            samples=cfg.samples, temperature=cfg.temperature, seed=cfg.seed, data=portable(path),
            data_hash=hash_of(path))
        print(f"{folder}: {write_deploy(folder, config, settings, results).name}")
        runs.append((config["arm"], config["seed"], results))
    print(format_table(runs))


if __name__ == "__main__":
    run_script(main, tyro.cli(Config, description=__doc__))
