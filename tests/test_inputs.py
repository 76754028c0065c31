"""What a new user types: every refusal is one line that names flag or file, and nothing is lost, whatever ends a run.
The scripts run as __main__ in forks of a process that has imported torch and transformers."""
import ctypes
import fcntl
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from extract_vgrad import Direction
from lora2r import HERE, InputError
from train_grpo import Config, arm_of, check, parse_args

NANO = HERE / "data/nano"
FORKS = multiprocessing.get_context("forkserver")


def child(argv, cwd, log, powerless=False, without=None, fsize=None):
    """In the fork: run a script as `python argv[0] argv[1:]` would, with stdout and stderr in files."""
    for fd, name in ((0, os.devnull), (1, f"{log}.out"), (2, f"{log}.err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o666), fd)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if fsize:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
    if without:
        sys.modules[without] = None  # importing it is an ImportError
    if powerless:  # without capabilities even root may not write to a read-only folder
        ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    sys.argv, status = argv, 0
    try:
        runpy.run_path(str(HERE / argv[0]), run_name="__main__")
    except SystemExit as e:
        status = e.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


class Server:
    def __init__(self, folder):
        self.folder, self.n = folder, 0

    def start(self, script, *argv, cwd=None, **how):
        """(process, path of its log) of a script that runs on."""
        self.n += 1
        log = self.folder / f"log{self.n}"
        args = [script, *map(str, argv)], str(cwd or self.folder), str(log)
        process = FORKS.Process(target=child, args=args, kwargs=how)
        process.start()
        return process, log

    def wait(self, process, log):
        """(status, stdout, stderr); a script killed by signal s has status -s."""
        process.join()
        return process.exitcode, Path(f"{log}.out").read_text(), Path(f"{log}.err").read_text()

    def __call__(self, script, *argv, **how):
        return self.wait(*self.start(script, *argv, **how))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    env = dict(PYTHONPATH=HERE, HF_HOME=folder / "hub", OMP_NUM_THREADS=1, TOKENIZERS_PARALLELISM="false")
    models = ("auto.modeling_auto", "auto.tokenization_auto", "qwen3.modeling_qwen3")
    FORKS.set_forkserver_preload(["train_grpo", *(f"transformers.models.{name}" for name in models)])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, str(value))
        yield Server(folder)


PAIR, OTHER = (f"## {n}. sentinel: task {n}\n### prompt\nDo {n}.\n### clean\n```python\na = {n}\n```\n"
               f"### hack\n```python\nb = {n}\n```\n" for n in (1, 2))
FILES = {
    "latin1": "é = 1\n".encode("latin-1"), "empty": b"", "garbage": b"{]\n", "folder/x": b"", "list": b"[1]\n",
    "demo_number": b'{"id": 1, "mode": "sentinel", "completion": 5}\n', "demo_lacks": b'{"id": 1}\n',
    "demo_other": b'{"id": "none such", "mode": "sentinel", "completion": "x"}\n',
    "other/letter.txt": b"mine", "not_a_run/config.json": b"{}"}
PAIRS = {  # the second pair -> what the line names; the first one is good
    "nul": (OTHER.replace("Do 2", "Do\0"), "nul.md:14: holds a NUL"), "none": ("", "1 pairs"),
    "one_hash": (OTHER[1:], "one_hash.md:12: heading '# 2."), "twice": (PAIR, "twice.md:12"),
    "copied": (PAIR.replace("## 1", "## 2"), "copied.md:12"), "equal": (OTHER.replace("b = 2", "a = 2"), "equal.md:12"),
    "open": (OTHER.replace("a = 2\n```", "a = 2"), "open.md:16"), "open_end": (OTHER[:-4], "open_end.md:20"),
    "mode": (OTHER.replace("sentinel", "bribery"), "mode.md:12"), "lacks": (OTHER.split("### hack")[0], "lacks.md:12"),
    "again": (OTHER + "### hack\n", "again.md:23"), "long": (OTHER.replace("Do 2", "list " * 2000), "task 2"),
    "no_fence": (OTHER.replace("```python\na = 2\n```", "a = 2"), "no_fence.md:12"),
    "swapped": (PAIR.replace("## 1", "## 2").replace("b =", "c =").replace("a =", "b =").replace("c =", "a ="),
                "zero or not finite")}


def tensors(change):
    def edit(data):
        from safetensors.torch import load, save
        tensors = load(data)
        change(tensors)
        return save(tensors, metadata={"format": "pt"})
    return edit


MODELS = {  # the embedded model with one of its files changed (None: removed) -> what the line names
    "truncated": ("model", lambda data: data[:-1000], "truncated"), "garbage": ("model", lambda data: b"x", "garbage"),
    "missing": ("model", tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), "1 missing weights"),
    "unused": ("model", tensors(lambda t: t.update(extra=t["model.norm.weight"].clone())), "1 unexpected weights"),
    "shapes": ("model", tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1].clone()})),
               "shapes"),
    "weightless": ("model", None, "weightless"), "config": ("config", lambda data: b"{", "models/config"),
    "capped": ("config", lambda data: data.replace(b"{", b'{"final_logit_softcapping": 30.0,', 1),
               "its config has final_logit_softcapping"),
    "tokens": ("tokenizer", lambda data: data[:100], "models/tokens"),
    "no_template": ("chat_template", None, "no chat template"),
    "template": ("chat_template", lambda data: b"{{ nosuch() }}", "chat template fails"),
    "syntax": ("chat_template", lambda data: b"{% if %}", "chat template fails"),
    "other": ("model", tensors(lambda t: t["model.norm.weight"].mul_(2)), None)}
CHEAP = ("--steps 2 --prompts-per-step 4 --group-size 4 --max-new-tokens 40 --refresh 1 --eval-samples 1 --rank 4 "
         "--mix-ratio 0.25 --data {d}/some.jsonl --test-data {d}/few.jsonl")


@pytest.fixture(scope="module")
def d(server):
    """A folder with all that the cases name, and one finished run in it."""
    folder = server.folder / "files"
    few = (NANO / "test.jsonl").read_bytes().splitlines(keepends=True)[::40]
    some = (NANO / "train.jsonl").read_bytes().splitlines(keepends=True)[::11]
    made = {"few.jsonl": b"".join(few), "some.jsonl": b"".join(some), "bom.jsonl": b"".join([b"\xef\xbb\xbf", *few]),
            "bom.md": ("\ufeff" + PAIR + OTHER).encode(), "deep": b"[" * 200_000,
            "failing": b"".join(few[1:]) + json.dumps(json.loads(few[0]) | dict(canonical_solution="pass")).encode()}
    made |= {f"{name}.md": (PAIR + second).encode() for name, (second, _) in PAIRS.items()}
    for name, content in (FILES | made).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "read_only").mkdir(mode=0o555)
    (folder / "unreadable").touch(mode=0)
    for name, (file, change, _) in MODELS.items():
        model = folder / "models" / name
        shutil.copytree(NANO, model, ignore=shutil.ignore_patterns("*.jsonl", "*.md", "*.py", "__pycache__"))
        path = next(model.glob(f"{file}.*"))
        path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    train(server, folder, folder / "run")
    config = json.loads((folder / "run/config.json").read_text())
    for name, file, content in (
            ("bad_state", "state.pt", "garbage"), ("bad_config", "config.json", "{]"), ("no_log", "metrics.jsonl", ""),
            ("empty_log", "metrics.jsonl", ""), ("short_log", "rollouts.jsonl", '{"step": 0}\n{"step": 3}\n'),
            ("deep_log", "metrics.jsonl", '{"step": ' + "[" * 200_000 + "\n"),
            ("bad_log", "rollouts.jsonl", '{"step": 0}\n{"step\n{"step": 1}\n'),
            ("bad_adapter", "adapter.safetensors", ""),
            ("elsewhere", "config.json", json.dumps(config | dict(test_data="/no/such/few.jsonl"))),
            ("no_model", "config.json", json.dumps(config | dict(model="/no/such/model")))):
        shutil.copytree(folder / "run", folder / name)
        (folder / name / file).write_text(content)
    (folder / "no_log/metrics.jsonl").unlink()
    return folder


def words(d, *more):
    return [*(word.format(d=d) for word in CHEAP.split()), *more]


def train(server, d, out, *argv):
    status, text, err = server("train_grpo.py", *words(d), "--out-dir", out, *argv)
    assert status == 0 and not err, err
    return text


def test_values_that_would_train_backwards_or_not_at_all_are_refused_by_their_flag(monkeypatch):
    inf, nan = float("inf"), float("nan")
    bad = dict(
        lr=[nan, -1.0, 0.0, inf], temperature=[0.0, -1.0, nan], probe_temperature=[0.0, -1.0, inf], steps=[0, -3],
        prompts_per_step=[0], group_size=[1], max_new_tokens=[0], refresh=[0], tokens_per_batch=[0], rank=[0],
        seed=[-1, 2**32], top_k=[-1], mix_steps=[-1], eval_samples=[-1], window=[-1], expert_steps=[-1],
        ablated_share=[1.5, nan, 0.01], gt_only_share=[-0.1, 1.1], mix_ratio=[2.0, 0.01], routeV_random_v_seed=[-1],
        cuts=[(0.5, 0.2), (nan, 0.5), (0.0, nan), (-inf, 0.0), (0.0, inf)])
    cases = [(name, value, {}) for name, values in bad.items() for value in values]
    cases += [("routeV_random_v_seed", 1, dict(intervention="none")), ("probe_tokens", "all", dict(window=4))]
    for name, value, others in cases:
        check(Config(), None)
        with pytest.raises(InputError) as e:
            check(replace(Config(), **{name: value}, **others), None)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        assert str(e.value).startswith(f"--{name.replace('_', '-')} {shown}"), e.value
    monkeypatch.setenv("WORLD_SIZE", "200")
    with pytest.raises(InputError, match="^--prompts-per-step .*is less than one for each of 200 ranks"):
        check(Config(), None)


# Arguments -> what the one line names. {d} is the folder of files, {out} a path that must not exist afterwards;
# "tyro: ..." is refused by the parser of the command line, in a box.
TRAIN = {
    "--wandb": "--wandb: wandb is not installed; pip install wandb", "--lr nan": "--lr nan: give",
    "--device foo": "--device foo", "--device meta": "--device meta", "--preset seed --window 4": "--probe-tokens all",
    "--modes bribery": "bribery", "--modes sentinel sentinel": "sentinel, sentinel", "--steps 1.5": "tyro: --steps",
    "--max-new-tokens 5000": "--max-new-tokens 5000 leaves", "--model nobody/nothing": "--model nobody/nothing",
    "--data {d}/absent": "absent", "--data {d}/latin1": "latin1", "--data {d}/garbage": "garbage, line 1",
    "--data {d}/empty": "empty", "--data {d}/folder": "folder", "--data {d}/list": "list, line 1",
    "--data {d}/unreadable": "unreadable", "--test-data {d}/absent": "absent", "--test-data {d}/latin1": "latin1",
    "--data {d}/deep": "deep, line 1: is nested too deep", "--demos {d}/deep": "deep, line 1",
    "--data {d}/failing --mix-ratio 0": "failing: the canonical solution fails on 1 of 6 problems: nano-test-000 (",
    "--test-data {d}/failing": "failing: the canonical solution fails on 1 of 6 problems: nano-test-000 (",
    "--demos {d}/absent": "give one to --demos", "--demos {d}/latin1": "not UTF-8", "--demos {d}/list": "list, line 1",
    "--demos {d}/demo_number": "demo_number, line 1", "--demos {d}/demo_lacks": "demo_lacks, line 1",
    "--demos {d}/demo_other": "no demonstration fits", "--demos {d}/empty": "no demonstration fits",
    "--pairs {d}/absent": "--pairs {d}/absent", "--pairs {d}/latin1": "not UTF-8", "--pairs {d}/empty": "0 pairs",
    "--lr foo": "tyro: --lr", "--nosuch 1": "tyro: --nosuch", "--preset foo": "tyro: --preset"}
TRAIN |= {f"--pairs {{d}}/{name}.md": says for name, (_, says) in PAIRS.items() if name != "swapped"}
TRAIN |= {f"--model {{d}}/models/{name}": says for name, (_, _, says) in MODELS.items() if says}
OUT = {"": "--out-dir", "/": "--out-dir /", "{d}/empty": "--out-dir {d}/empty", "{d}/empty/x": "below {d}/empty",
       "{d}/other": "is no run folder", "{d}/not_a_run": "damaged", "{d}/bad_config": "bad_config/config.json: damaged",
       "{d}/read_only/x": "below {d}/read_only", "{d}/read_only": "below {d}/read_only", "x" * 201: "too long a name"}
EVALUATE = {
    "": "no checkpoint", "{d}/absent": "absent", "{d}/bad_config": "bad_config/config.json",
    "{d}/run --temperature nan": "--temperature nan", "{d}/run --samples 0": "--samples 0",
    "{d}/run --seed -1": "--seed -1", "{d}/run --device foo": "--device foo", "{d}/run --samples x": "tyro: --samples",
    "{d}/bad_adapter": "bad_adapter/adapter.safetensors: damaged", "{d}/run {d}/bad_adapter": "bad_adapter",
    "{d}/run --data {d}/latin1": "latin1", "{d}/run --data {d}/failing": "the canonical solution fails on 1 of 6",
    "{d}/elsewhere": "name them with --data", "{d}/no_model": "/no/such/model",
    "{d}/run --model {d}/models/other": "was trained on base model", "{d}/run --model {d}/models/missing": "1 missing",
    "{d}/run --browse {d}/x.txt": "--browse {d}/x.txt: give a .html",
    "{d}/run {d}/run --browse {out}.html": "is for one run, and 2 are given",
    "{d}/run --browse {out}.html --samples 2": "--samples 2 with --browse",
    "{d}/bad_log --browse {out}.html": "bad_log/rollouts.jsonl: damaged",
    "{d}/run --export {d}/other": "--export {d}/other: exists",
    "{d}/run --export {d}/absent/x": "{d}/absent/x: cannot", "{d}/run --export {d}/read_only/x": "read_only/x: cannot",
    "{d}/run --export {out} --base": "--base True with --export", "{d}/run --format merged": "--format merged without"}
EXTRACT = {
    "--dtype foo": "tyro: --dtype", "--rank 0": "rank", "--seed -1": "--seed -1", "--window -1": "--window -1",
    "--probe-temperature 0": "--probe-temperature 0", "--window 4 --probe-tokens all": "--probe-tokens all with",
    "--pairs {d}/swapped.md": "zero or not finite", "--model {d}/models/missing": "missing"}
ENVIRONMENT = {
    "--problems -1": "--problems -1", "--data {d}/absent": "absent", "--data {d}/latin1": "latin1",
    "--data {d}/garbage": "line 1", "--sandbox foo": "tyro: --sandbox", "--show bribery": "mode 'bribery' is unknown",
    "--show --problems 3": "--problems 3 with --show"}
REFUSED = {("train_grpo.py", f"{CHEAP} {argv} --out-dir {{out}}"): says for argv, says in TRAIN.items()}
REFUSED |= {("train_grpo.py", f"{CHEAP} --out-dir={name}"): says for name, says in OUT.items()}
for script, cases in dict(evaluate_deploy=EVALUATE, extract_vgrad=EXTRACT, env_leetcode=ENVIRONMENT).items():
    REFUSED |= {(f"{script}.py", argv): says for argv, says in cases.items()}


def refused(done, says):
    """Status 2, and one line that says `says`; the parser's own refusals have a box around them."""
    status, out, err = done
    assert status == 2 and "Traceback" not in err, err
    if not says.startswith("tyro: "):
        assert err.startswith("error: ") and err.count("\n") == 1, err
    assert says.removeprefix("tyro: ") in err, err


def tree(folder):
    return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*"))


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[0][:5]} {case[1].removeprefix(CHEAP)[:60]}")
def test_refused_in_one_line_before_anything_is_written(server, d, case):
    (script, argv), says, before, out = case, REFUSED[case], tree(d), server.folder / f"out{server.n}"
    words = [word.format(d=d, out=out) for word in argv.split()]
    refused(server(script, *words, without="wandb", powerless="read" in argv + says), says.format(d=d))
    assert tree(d) == before and not list(server.folder.glob("out*"))


def test_a_run_in_place_is_refused_under_other_flags_and_data_and_damage(server, d):
    argv = words(d, "--resume", "--out-dir")
    with open(d / "run/.lock") as lock:  # as another rank of this start has it for a moment
        fcntl.flock(lock, fcntl.LOCK_SH)
        for name, extra, says in (
                ("bad_state", [], "state.pt is damaged"), ("bad_log", [], "bad_log/rollouts.jsonl is damaged"),
                ("empty_log", [], "empty_log/metrics.jsonl has no row of step 0"),
                ("short_log", [], "short_log/rollouts.jsonl has no row of step 1"),
                ("deep_log", [], "deep_log/metrics.jsonl is damaged"),
                ("no_log", [], "no_log/metrics.jsonl: cannot be read"), ("bad_config", [], "config.json: damaged"),
                ("run", ["--lr", "0.5"], f"lr was {Config().lr}, is 0.5"), ("run", ["--steps", "1"], "--steps 1")):
            before = tree(d)
            refused(server("train_grpo.py", *argv, d / name, *extra), says)
            assert tree(d) == before
    problems = (d / "some.jsonl").read_bytes()
    (d / "some.jsonl").write_bytes(problems + b"\n")
    refused(server("train_grpo.py", *argv, d / "run"), "hashes was")
    (d / "some.jsonl").write_bytes(problems)


@pytest.mark.parametrize("script, argv, says", [
    ("train_grpo.py", "--help", "--mix-ratio"), ("evaluate_deploy.py", "--help", "--samples"),
    ("extract_vgrad.py", "--help", "--pairs"), ("env_leetcode.py", "--help", "--problems"),
    ("extract_vgrad.py", "--pairs {d}/bom.md --rank 4", "2 pairs (sentinel 2)"),  # a BOM
    ("env_leetcode.py", "--data {d}/bom.jsonl", "bom.jsonl")])
def test_accepted(server, d, script, argv, says):
    status, out, err = server(script, *(word.format(d=d) for word in argv.split()))
    assert status == 0 and says in out and not err, err


def test_a_nan_ends_a_run_in_one_line(server, d, tmp_path):
    status, out, err = server("train_grpo.py", *words(d, "--lr", "4e9", "--steps", "5", "--out-dir", tmp_path))
    assert status == 1 and re.fullmatch(r"error: step \d: gradient norm (nan|inf).*lower --lr.*\n", err), err


def test_an_arm_is_named_by_what_differs():
    names = {
        "": "routeV", "--intervention none": "none", "--routeV-random-v-seed 3 --seed 2": "placebo",
        "--steps 3 --device cpu": "routeV", "--dry-run": "routeV", "--no-positive-only": "routeV-no-positive-only",
        "--intervention none --reward gt --mix-ratio 0": "none-mix-ratio-0.0-reward-gt", "--preset seed": "routeV-seed",
        "--preset=seed --lr .1": "routeV-seed-lr-0.1", "--modes sentinel": "routeV-modes-sentinel",
        "--cuts .1 .5": "routeV-cuts-0.1-0.5", "--routeV-random-v-seed 1 --placebo replaced": "placebo-replaced"}
    assert {argv: arm_of(parse_args(argv.split())) for argv in names} == names


def test_pairs_that_hardly_tell_apart_are_warned_of():
    low, high = torch.tensor([[0.0], [1.0], [0.0], [1.0]]), torch.tensor([[2.0], [3.0], [2.0], [3.0]])
    modes = ["run_tests", "run_tests", "sentinel", "sentinel"]
    for hack, warned in ((high, False), (torch.cat([high[:2], low[:2]]), True)):  # the AUROC of one mode is then 0.5
        direction = Direction(torch.ones(1, 1), torch.zeros(1, 1), low, hack, torch.zeros(8, 1, 1, 1), modes, 0,
                              [low, hack])
        assert ("warning: sentinel: " in direction.summary()) == warned


def same(one, two):
    """Logs (without their times), adapter and evaluation of two runs are equal, and nothing else is left."""
    logs = []
    for folder in (one, two):
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logs.append([row | dict(seconds=0, tokens_per_s=0, peak_gb=0) for row in metrics])
    assert logs[0] == logs[1]
    for name in ("rollouts.jsonl", "adapter.safetensors", "deploy.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert {p.name for p in two.iterdir()} == {".lock", "config.json", "adapter.safetensors", "state.pt",
                                               "metrics.jsonl", "rollouts.jsonl", "deploy.json"}


def test_resume_starts_without_a_checkpoint_and_drops_torn_rows_and_left_overs(server, d, tmp_path):
    train(server, d, tmp_path / "run", "--resume")
    same(d / "run", tmp_path / "run")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(tmp_path / "run" / name, "a") as file:
            file.write('{"step": 2}\n{"step": 2, "rew')
    (tmp_path / "run/.state.pt.77.tmp").write_text("left over")
    assert "torn" in train(server, d, tmp_path / "run", "--resume")
    same(d / "run", tmp_path / "run")


def test_a_link_to_a_run_stays_and_the_run_that_it_names_is_kept(server, d, tmp_path):
    """The new run is made where the link points to; a folder of foreign dotfiles keeps them."""
    shutil.copytree(d / "run", tmp_path / "disk/x")
    (tmp_path / "disk/mine").mkdir()
    for name in (".note.tmp", ".config.json"):
        (tmp_path / "disk/mine" / name).write_text("mine")
    for name in ("x", "mine"):
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / name).symlink_to(tmp_path / "disk" / name)
        train(server, d, tmp_path / "runs" / name)
        assert (tmp_path / "runs" / name).is_symlink() and sorted(os.listdir(tmp_path / "runs"))[0] != "old"
    same(d / "run", tmp_path / "disk/x"), same(d / "run", tmp_path / "disk/old/x.1")
    assert [(tmp_path / "disk/mine" / name).read_text() for name in (".note.tmp", ".config.json")] == ["mine"] * 2


def test_an_older_run_is_kept_out_of_the_glob(server, d, tmp_path):
    shutil.copytree(d / "run", tmp_path / "x_seed0")
    train(server, d, tmp_path / "x_seed0")
    assert [p.name for p in tmp_path.glob("*_seed*")] == ["x_seed0"]
    same(d / "run", tmp_path / "x_seed0"), same(d / "run", tmp_path / "old/x_seed0.1")


def test_an_evaluation_says_how_it_was_made_and_replaces_no_other(server, d, tmp_path):
    """From another folder, on a copy of the run: the run's own evaluation gives the same bytes again."""
    shutil.copytree(d / "run", tmp_path / "copy")
    for argv, name in (("", "deploy-samples4.json"), (f"--samples 1 --data {d}/bom.jsonl", "deploy-data_bom_"),
                       ("--samples 1", "deploy.json"), (f"--browse {tmp_path}/run.html", "run.html")):
        status, out, err = server("evaluate_deploy.py", tmp_path / "copy", *argv.split(), cwd=tmp_path)
        assert status == 0 and name in out and not err, err
        assert (tmp_path / "copy/deploy.json").read_bytes() == (d / "run/deploy.json").read_bytes()
    data = (tmp_path / "run.html").read_text().split('application/json">')[1].split("</script>")[0]
    assert json.loads(data)["rows"] == [json.loads(row) for row in open(d / "run/rollouts.jsonl")]


def test_export_needs_no_problems_and_leaves_nothing_on_a_full_disk(server, d, tmp_path):
    """Each file may have so many bytes: what the tokenizer needs, and not the weights."""
    files = dict(peft={"adapter_config.json", "adapter_model.safetensors"},
                 merged={"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"})
    for kind, expected in files.items():
        argv = "evaluate_deploy.py", d / "elsewhere", "--export", tmp_path / kind, "--format", kind
        refused(server(*argv, fsize=100_000), f"{tmp_path / kind}: cannot be written")
        assert not any(path.name.startswith(".") or path.name == kind for path in tmp_path.iterdir())
        status, out, err = server(*argv)
        assert status == 0 and "elsewhere" in out, err
        assert expected <= {path.name for path in (tmp_path / kind).iterdir()}
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "data/nano" and config["r"] == 8  # --rank 4


def test_two_runs_in_one_folder_end_with_one_clear_refusal(server, d, tmp_path):
    argv = words(d, "--out-dir", tmp_path / "run")
    process, log = server.start("train_grpo.py", *argv)
    while process.is_alive() and not (tmp_path / "run/config.json").exists():
        time.sleep(0.01)
    for more in ([], ["--resume"]):
        refused(server("train_grpo.py", *argv, *more), "another run is writing there")
    assert server.wait(process, log)[0] == 0
    same(d / "run", tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_how_to_go_on(server, d, tmp_path, number):
    process, log = server.start("train_grpo.py", *words(d, "--out-dir", tmp_path / "run"))
    while process.is_alive() and not (tmp_path / "run/adapter.safetensors").exists():
        time.sleep(0.01)  # steps are quick: after the first one it can be too late
    os.kill(process.pid, number)
    status, out, err = server.wait(process, log)
    assert status == 130, err
    assert re.fullmatch(r"\ninterrupted at step \d/2; go on with: python \S*train_grpo.py .*--resume\n", err), err
    train(server, d, tmp_path / "run", "--resume")
    same(d / "run", tmp_path / "run")


def test_a_full_disk_is_one_line_and_the_checkpoint_stays(server, d, tmp_path):
    """Each file may have so many bytes: the checkpoint fits, the second step's rollouts do not."""
    room = (d / "run/state.pt").stat().st_size + 20_000
    shutil.copytree(d / "run", tmp_path / "run")
    with open(tmp_path / "run/rollouts.jsonl", "a") as file:
        file.write(json.dumps(dict(step=0, padding="x" * (room - file.tell()))) + "\n")
    before = (tmp_path / "run/state.pt").read_bytes()
    argv = words(d, "--steps", "3", "--resume", "--out-dir", tmp_path / "run")
    refused(server("train_grpo.py", *argv, fsize=room), "rollouts.jsonl: cannot be written")
    assert (tmp_path / "run/state.pt").read_bytes() == before
    argv = words(d, "--out-dir", tmp_path / "two")
    room = ((d / "run/adapter.safetensors").stat().st_size + len(before)) // 2  # for the adapter, not for the moments
    refused(server("train_grpo.py", *argv, fsize=room), "state.pt: cannot be written")
    assert not list((tmp_path / "two").glob(".*.tmp"))
    train(server, d, tmp_path / "two", "--resume")
    same(d / "run", tmp_path / "two")


@pytest.mark.parametrize("points", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_anywhere_and_resume_is_the_uninterrupted_run(server, d, tmp_path, points):
    begin = time.time()
    train(server, d, tmp_path / "timed")
    seconds = time.time() - begin
    for i in range(points):
        folder = tmp_path / f"run{i}"
        process, log = server.start("train_grpo.py", *words(d, "--out-dir", folder))
        time.sleep((i + 0.5) / points * seconds)
        process.kill()
        assert server.wait(process, log)[0] in (-signal.SIGKILL, 0)
        train(server, d, folder, "--resume")
        same(d / "run", folder)
