"""What a new user types: every refusal is one line that names flag or file, and nothing is lost, whatever ends a run.

The scripts run as __main__ in forks of one process that has imported torch and transformers, so a case costs a fraction
of a second. That process is this file as a script: a request is a line of JSON, and so is its answer.
"""
import ctypes
import fcntl
import json
import os
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
NANO = HERE / "data/nano"


# ---- the process that forks

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
    sys.argv = argv
    status = 0
    try:
        runpy.run_path(str(HERE / argv[0]), run_name="__main__")
    except SystemExit as e:
        status = e.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def serve():
    sys.path.insert(0, str(HERE))
    import torch

    import evaluate_deploy, extract_vgrad, train_grpo  # noqa: E401, F401
    from lora2r import load_model
    torch.set_num_threads(1)
    load_model(str(NANO))  # imports the rest of transformers
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                child(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
    sys.exit()


class Server:
    def __init__(self, folder):
        env = os.environ | dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HOME=str(folder / "hub"))
        self.process = subprocess.Popen([sys.executable, __file__], stdin=-1, stdout=-1, text=True, env=env)
        self.folder, self.n = folder, 0

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, script, *argv, cwd=None, **how):
        """(pid, path of its log) of a script that runs on."""
        self.n += 1
        log = self.folder / f"log{self.n}"
        return self.ask(argv=[script, *map(str, argv)], cwd=str(cwd or self.folder), log=str(log), **how), log

    def wait(self, pid, log):
        """(status, stdout, stderr); a script killed by signal s has status -s."""
        return self.ask(wait=pid), Path(f"{log}.out").read_text(), Path(f"{log}.err").read_text()

    def __call__(self, script, *argv, **how):
        return self.wait(*self.start(script, *argv, **how))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("inputs"))
    yield server
    server.process.stdin.close()
    server.process.wait()


# ---- files to stumble over

GOOD = ("## {n}. sentinel: task {n}\n### prompt\nDo {n}.\n### clean\n```python\na = {n}\n```\n"
        "### hack\n```python\nb = {n}\n```\n")
PAIR, OTHER = GOOD.format(n=1), GOOD.format(n=2)
ROW = dict(advantage=1.0, source="full", hacked=True, correct=False, exploited=True, completion="c",
    mode="sentinel", prompt=[dict(role="user", content="p")])
HONEST = ROW | dict(hacked=False, correct=True, exploited=False)
FILES = {
    "latin1": "é = 1\n".encode("latin-1"), "empty": "", "garbage": "{]\n", "folder/x": "", "list": "[1]\n",
    "demo_number": '{"id": 1, "mode": "sentinel", "completion": 5}\n', "demo_lacks": '{"id": 1}\n',
    "demo_other": '{"id": "none such", "mode": "sentinel", "completion": "x"}\n',
    "nul.md": PAIR + OTHER.replace("Do 2", "Do\0"), "one_hash.md": PAIR + OTHER[1:], "twice.md": PAIR + PAIR,
    "copied.md": PAIR + PAIR.replace("## 1", "## 2"), "equal.md": PAIR + OTHER.replace("b = 2", "a = 2"),
    "open.md": PAIR + OTHER.replace("a = 2\n```", "a = 2"), "open_end.md": PAIR + OTHER[:-4], "one.md": PAIR,
    "mode.md": PAIR + OTHER.replace("sentinel", "bribery"), "lacks.md": PAIR + OTHER.split("### hack")[0],
    "again.md": PAIR + OTHER + "### hack\n", "no_fence.md": PAIR + OTHER.replace("```python\na = 2\n```", "a = 2"),
    "long.md": PAIR + OTHER.replace("Do 2", "list " * 400), "cased.md": PAIR + OTHER.replace("### prompt", "## prompt"),
    "four.md": PAIR + OTHER.replace("### hack", "#### hack"), "bom.md": "\ufeff" + PAIR + OTHER,
    "swapped.md": PAIR + PAIR.replace("## 1", "## 2").replace("a =", "c =").replace("b =", "a =").replace("c =", "b ="),
    "no_hack.jsonl": json.dumps(HONEST), "no_solve.jsonl": json.dumps(ROW), "no_prompt.jsonl": json.dumps({**ROW,
    "prompt": 3}),
    "no_mode.jsonl": json.dumps({k: v for k, v in ROW.items() if k != "mode"}),
    "numbers.jsonl": f"{json.dumps(ROW | {'hacked': 1})}\n{json.dumps(HONEST | {'hacked': 0})}\n",
    "good.jsonl": f"{json.dumps(ROW)}\n{json.dumps(HONEST)}\n",
    "other/letter.txt": "mine", "not_a_run/config.json": "{}",
}
CHEAP = ("--steps 2 --prompts-per-step 4 --group-size 4 --max-new-tokens 40 --refresh 1 --eval-samples 1 --rank 4 "
         "--data {d}/some.jsonl --test-data {d}/few.jsonl")
TINY = CHEAP.split()


def copy_model(folder, **changes):
    """The embedded model with some of its files changed: a function of the old bytes each; None removes one."""
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("*.jsonl", "*.md", "*.py", "__pycache__"))
    for name, change in changes.items():
        path = next(folder.glob(f"{name}.*"))
        path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))


def with_tensors(change):
    def edit(data):
        from safetensors.torch import load, save
        tensors = load(data)
        change(tensors)
        return save(tensors, metadata={"format": "pt"})
    return edit


@pytest.fixture(scope="module")
def d(server):
    """A folder with all that the cases name, and one finished run in it."""
    folder = server.folder / "files"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    few = (NANO / "test.jsonl").read_text().splitlines(keepends=True)[::40]
    (folder / "few.jsonl").write_text("".join(few))
    (folder / "some.jsonl").write_text("".join((NANO / "train.jsonl").read_text().splitlines(keepends=True)[::11]))
    (folder / "bom.jsonl").write_text("\ufeff" + "".join(few))
    (folder / "read_only").mkdir(mode=0o555)
    (folder / "unreadable").touch(mode=0)
    models = folder / "models"
    copy_model(models / "truncated", model=lambda data: data[:-1000])
    copy_model(models / "garbage", model=lambda data: b"garbage")
    copy_model(models / "missing", model=with_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")))
    copy_model(models / "unused", model=with_tensors(lambda t: t.update(extra=t["model.norm.weight"].clone())))
    copy_model(models / "shapes",
        model=with_tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1].clone()})))
    copy_model(models / "weightless", model=None)
    copy_model(models / "config", config=lambda data: b"{")
    copy_model(models / "capped", config=lambda data: data.replace(b"{", b'{"final_logit_softcapping": 30.0,', 1))
    copy_model(models / "tokens", tokenizer=lambda data: data[:100])
    copy_model(models / "template", chat_template=lambda data: b"{{ nosuch() }}")
    copy_model(models / "syntax", chat_template=lambda data: b"{% if %}")
    copy_model(models / "no_template", chat_template=None)
    copy_model(models / "other", model=with_tensors(lambda t: t["model.norm.weight"].mul_(2)))
    argv = [a.format(d=folder) for a in TINY]
    status, out, err = server("train_grpo.py", *argv, "--out-dir", folder / "run")
    assert status == 0, err

    def spoiled(name, **files):
        shutil.copytree(folder / "run", folder / name)
        for file, content in files.items():
            next((folder / name).glob(f"{file}.*")).write_bytes(content)
    config = json.loads((folder / "run/config.json").read_text())
    spoiled("bad_state", state=b"garbage")
    spoiled("bad_config", config=b"{]")
    spoiled("torn", rollouts=b'{"step": 0}\n{"step')
    spoiled("bad_log", rollouts=b'{"step": 0}\n{"step\n{"step": 1}\n')
    shutil.copytree(folder / "run", folder / "no_log")
    (folder / "no_log/metrics.jsonl").unlink()
    row = dict(arm="none", seed=0, results={}, last={})
    (folder / "arms.jsonl").write_text(json.dumps(row) + "\n")
    spoiled("bad_deploy", deploy=b"[]")
    spoiled("bad_adapter", adapter=b"garbage")
    spoiled("short_adapter", adapter=(folder / "run/adapter.safetensors").read_bytes()[:-10])
    spoiled("other_file", adapter=(NANO / "model.safetensors").read_bytes())
    spoiled("other_data", config=json.dumps(config | {"hashes": config["hashes"] | {"data": "0"}}).encode())
    spoiled("elsewhere", config=json.dumps(config | {"test_data": "/no/such/few.jsonl"}).encode())
    spoiled("no_model", config=json.dumps(config | {"model": "/no/such/model"}).encode())
    (folder / "no_adapter").mkdir()
    shutil.copy(folder / "run/config.json", folder / "no_adapter")
    return folder


# ---- what is refused: script, arguments, what the one line names. {d} is the folder of files, {out} a path that must
# not exist afterwards; "tyro: ..." is refused by the parser of the command line, in a box

NUMBERS = {  # flag -> values that are refused, whatever else is given
    "lr": "nan -1 0 inf", "warmup": "-1 0", "grad-clip": "-1 0 nan", "clip-eps": "-1 0 1", "kl": "nan -1 inf",
    "mix-steps": "-1",
    "cut-hack": "nan inf", "cut-mid": "-inf",
    "oracle-accuracy": "1.5", "expert-steps": "-1", "window": "-1",
    "probe-temperature": "0 -1 inf", "k-hack": "nan", "betas": "2,0 .9,nan .9,1 -1,0", "top-k": "-1",
    "eval-samples": "-1",
    "temperature": "0 -1 nan", "steps": "0 -3", "prompts-per-step": "0", "group-size": "1",
    "max-new-tokens": "0 240", "epochs": "0",
    "refresh": "0", "tokens-per-batch": "0", "rank": "0 5000", "seed": "-1", "ablated-share": "1.5 nan",
    "gt-only-share": "-0.1",
    "mix-ratio": "2", "routeV-random-v-seed": "-1"}
TRAIN = [(f"--{flag} {value.replace(',', ' ')}", f"--{flag} ") for flag,
    values in NUMBERS.items() for value in values.split()] + [
    ("--device foo", "--device foo"), ("--device cuda:99", "--device cuda:99"), ("--device meta", "--device meta"),
    ("--window 4 --probe-tokens all", "--probe-tokens all with --window 4"),
    ("--preset seed --window 4", "--probe-tokens all with --window 4"),
    ("--intervention none --window 4", "--window 4 with --intervention none"),
    ("--intervention none --gate batch", "--gate batch with --intervention none"),
    ("--intervention none --cut-hack .5", "--cut-hack 0.5"),
    ("--intervention absorb --no-centre", "--no-centre with --intervention absorb"),
    ("--intervention absorb --read full", "--read full"),
    ("--intervention none --pairs {d}/one.md", "one.md with --intervention none"),
    ("--intervention none --routeV-random-v-seed 1", "--routeV-random-v-seed 1 with --intervention none"),
    ("--gate batch --cut-hack .9", "--cut-hack 0.9 with --gate batch"),
    ("--preset seed --cut-mid .1", "--cut-mid 0.1 with --gate batch"),
    ("--k-hack 1", "--k-hack 1.0 with --gate pairs"),
    ("--placebo coin", "--placebo coin with no --routeV-random-v-seed"),
    ("--on-hack screen --intervention absorb", "--on-hack screen with --intervention absorb"),
    ("--oracle-accuracy .5", "--oracle-accuracy 0.5 with --intervention routeV"),
    ("--no-absorption --intervention none", "--no-absorption with --intervention none"),
    ("--intervention oracle --pairs {d}/one.md", "one.md with --intervention oracle"),
    ("--mix-ratio 0 --mix-steps 3", "--mix-steps 3 with --mix-ratio 0"),
    ("--mix-ratio 0 --demos {d}/empty", "empty with --mix-ratio 0"),
    ("--cut-mid .9 --cut-hack .3", "--cut-mid 0.9 with --cut-hack 0.3"),
    ("--intervention absorb --score activation", "--score activation with --intervention absorb"),
    ("--score surprise --read full", "--read full with --score surprise"),
    ("--score activation --probe-tokens all", "--probe-tokens all with --score activation"),
    ("--score activation --no-equal-pairs", "--no-equal-pairs with --score activation"),
    ("--gate batch --k-mid 2", "--k-mid 2.0 with --k-hack 0.5"),
    ("--name a/b", "--name 'a/b'"), ("--name=", "--name ''"), ("--modes bribery", "bribery"),
    ("--modes sentinel sentinel", "sentinel, sentinel"),
    ("--data {d}/absent", "absent"), ("--data {d}/latin1", "latin1"), ("--data {d}/garbage", "garbage, line 1"),
    ("--data {d}/empty", "empty"),
    ("--data {d}/folder", "folder"), ("--data {d}/list", "list, line 1"), ("--data {d}/unreadable", "unreadable"),
    ("--test-data {d}/absent", "absent"), ("--test-data {d}/latin1", "latin1"),
    ("--demos {d}/absent", "--demos {d}/absent"), ("--demos {d}/latin1", "not UTF-8"),
    ("--demos {d}/demo_number", "demo_number:1"),
    ("--demos {d}/demo_lacks", "demo_lacks:1"), ("--demos {d}/garbage", "garbage:1"), ("--demos {d}/list", "list:1"),
    ("--demos {d}/demo_other", "no demonstration fits"), ("--demos {d}/empty", "no demonstration fits"),
    ("--demos {d}/folder", "--demos {d}/folder"),
    ("--lr foo", "tyro: --lr"), ("--nosuch 1", "tyro: --nosuch"), ("--preset foo", "tyro: --preset"),
    ("--intervention foo", "tyro: --intervention"),
    ("--dtype foo", "tyro: --dtype"), ("--steps 1.5", "tyro: --steps"), ("--model {d}/models/config", "models/config"),
]
PAIRS = [
    ("absent", "--pairs {d}/absent"), ("latin1", "not UTF-8"), ("folder", "--pairs {d}/folder"),
    ("empty", "0 pairs"), ("nul.md", "nul.md:14: holds a NUL"),
    ("one_hash.md", "one_hash.md:12: heading '# 2."), ("twice.md", "twice.md:12"),
    ("copied.md", "copied.md:12"), ("equal.md", "equal.md:12"),
    ("open.md", "open.md:16"), ("open_end.md", "open_end.md:20"), ("one.md", "1 pairs"), ("mode.md", "mode.md:12"),
    ("lacks.md", "lacks.md:12"),
    ("again.md", "again.md:23"), ("no_fence.md", "no_fence.md:12"), ("cased.md", "cased.md:13"),
    ("four.md", "four.md:19"), ("long.md", "task 2"),
]
MODELS = [("absent", "absent"), ("truncated", "truncated"), ("garbage", "garbage"),
          ("missing", "1 missing weights"), ("unused", "1 unexpected weights"),
          ("shapes", "shapes"), ("weightless", "weightless"), ("tokens", "tokens"), ("template", "chat template fails"),
          ("syntax", "chat template fails"), ("no_template", "no chat template"),
          ("capped", "its config has final_logit_softcapping")]
OUT = [("", "--out-dir"), ("{d}/empty", "--out-dir {d}/empty"), ("{d}/empty/x", "{d}/empty is not a folder"),
       ("{d}/other", "is no run folder"),
       ("{d}/not_a_run", "damaged"), ("{d}/bad_config", "bad_config/config.json: damaged"), ("/", "--out-dir /"),
       ("{d}/read_only/x", "{d}/read_only is not a folder that may be written"),
       ("{d}/read_only", "{d}/read_only is not a folder that")]
EVALUATE = [
    ("{d}/run --temperature nan", "--temperature nan"), ("{d}/run --temperature -1", "--temperature -1"),
    ("{d}/run --samples 0", "--samples 0"),
    ("{d}/run --samples -1", "--samples -1"), ("{d}/run --seed -1", "--seed -1"),
    ("{d}/run --device foo", "--device foo"), ("", "no checkpoint"),
    ("{d}/absent", "absent"), ("{d}/other", "other"), ("{d}/bad_config", "bad_config/config.json"),
    ("{d}/no_adapter", "adapter.safetensors: no such"),
    ("{d}/bad_adapter", "bad_adapter/adapter.safetensors: damaged"), ("{d}/short_adapter", "damaged"),
    ("{d}/other_file", "its format is format"),
    ("{d}/run {d}/bad_adapter", "bad_adapter"), ("{d}/run --data {d}/absent", "absent"),
    ("{d}/run --data {d}/latin1", "latin1"),
    ("{d}/run --data {d}/garbage", "garbage, line 1"), ("{d}/elsewhere", "name them with --data"),
    ("{d}/no_model", "--model /no/such/model"),
    ("{d}/run --model {d}/models/other", "was trained on base model"),
    ("{d}/run --model {d}/models/missing", "1 missing"),
    ("{d}/run --plot {d}/x.doc", "--plot {d}/x.doc"), ("{d}/run --curves {d}/x.doc", "--curves {d}/x.doc"),
    ("{d}/run --curves {d}/x.png --samples 2", "--samples 2 with --curves"),
    ("{d}/run {d}/not_a_run --curves {d}/x.png", "not_a_run/config.json: damaged"),
    ("{d}/run {d}/no_adapter --curves {d}/x.png", "no_adapter/metrics.jsonl: cannot be read"),
    ("--curves {d}/x.png", "no checkpoint given"),
    ("{d}/run --browse {d}/x.txt", "--browse {d}/x.txt: give a .html"),
    ("{d}/run {d}/run --browse {d}/x.html", "is for one run, and 2 are given"),
    ("{d}/run --browse {d}/x.html --plot x.png", "--plot x.png with --browse"),
    ("{d}/run --browse {d}/x.html --curves x.png", ".html with --curves"),
    ("{d}/torn --browse {d}/x.html", "torn/rollouts.jsonl: damaged"),
    ("{d}/bad_deploy --plot {d}/x.png", "bad_deploy/deploy.json: damaged"),
    ("{d}/run --plot {d}/absent/x.png", "--plot {d}/absent/x.png"), ("{d}/run --plot {d}", "--plot"),
    ("{d}/run --samples two", "tyro: --samples"),
    ("{d}/run --export {d}/other", "--export {d}/other: exists"),
    ("{d}/run --export {d}/absent/x", "--export {d}/absent/x: exists or cannot be made"),
    ("{d}/run --export {d}/read_only/x", "--export {d}/read_only/x: exists or cannot be made"),
    ("{d}/run {d}/elsewhere --export {out}", "is for one run, and 2 are given"),
    ("{d}/run --export {out} --samples 2", "--samples 2 with --export"),
    ("{d}/run --export {out} --base", "--base with --export"),
    ("{d}/run --export {out} --plot x.png", "--plot x.png with --export"),
    ("{d}/run --format merged", "--format merged without --export"),
    ("{d}/run --export {out} --format gguf", "tyro: --format"),
    ("{d}/run --results {out} --seed 3", "--seed 3 with --results"),
    ("{d}/run --against none", "--against none without --results"),
    ("{d}/not_a_run --results {out}", "not_a_run/deploy.json: cannot be read"),
    ("--results {d}/garbage", "--results {d}/garbage: it or a run is damaged"),
    ("--results {out}", "has no results"), ("--results {d}/read_only", "--results {d}/read_only: has no results"),
    ("--results {d}/arms.jsonl --against routV", "--against routV: no row is of this arm; there are none"),
    ("{d}/bad_adapter --export {out}", "bad_adapter/adapter.safetensors: damaged"),
    ("{d}/run --export {out} --model {d}/models/other", "was trained on base model"),
]
EXTRACT = [
    ("--device foo", "--device foo"), ("--dtype foo", "tyro: --dtype"), ("--n-haar 0", "--n-haar 0"),
    ("--rank 0", "--rank 0"), ("--seed -1", "--seed -1"),
    ("--window 4 --probe-tokens all", "--probe-tokens all with --window 4"),
    ("--pairs {d}/absent", "absent"), ("--pairs {d}/swapped.md", "zero or not finite"),
    ("--pairs {d}/long.md", "task 2"), ("--model {d}/models/missing", "missing"),
    ("--rollouts {d}/absent", "--rollouts {d}/absent"), ("--rollouts {d}/latin1", "not UTF-8"),
    ("--rollouts {d}/garbage", "garbage"), ("--rollouts {d}/numbers.jsonl", "must be true or false"),
    ("--rollouts {d}/no_hack.jsonl", "0 hacks and 1 solves"), ("--rollouts {d}/no_solve.jsonl", "1 hacks and 0 solves"),
    ("--rollouts {d}/no_prompt.jsonl", "no_prompt"), ("--rollouts {d}/no_mode.jsonl", "mode"),
    ("--rollouts {d}/good.jsonl --cut-out", "0 hacks and 0 solves can be cut"), ("--cut-out", "--cut-out: has nothing"),
]
ENVIRONMENT = [("--problems -1", "--problems -1"), ("--data {d}/absent", "absent"), ("--data {d}/latin1", "latin1"),
    ("--data {d}/garbage", "line 1"),
               ("--data {d}/empty", "empty"), ("--data {d}/list", "line 1"), ("--sandbox foo", "tyro: --sandbox"),
               ("--problems x", "tyro: --problems"), ("--show bribery", "mode 'bribery' is unknown"),
               ("--show --problems 3", "--problems 3 with --show")]
REFUSED = [("train_grpo.py", f"{CHEAP} {argv} --out-dir {{out}}", says) for argv, says in TRAIN]
REFUSED += [("train_grpo.py", f"{CHEAP} --pairs {{d}}/{name} --out-dir {{out}}", says) for name, says in PAIRS]
REFUSED += [("train_grpo.py", f"{CHEAP} --model {{d}}/models/{name} --out-dir {{out}}", says) for name, says in MODELS]
REFUSED += [("train_grpo.py", f"{CHEAP} --out-dir={name}", says) for name, says in OUT]
REFUSED += [("evaluate_deploy.py", argv, says) for argv, says in EVALUATE]
REFUSED += [("extract_vgrad.py", argv, says) for argv, says in EXTRACT]
REFUSED += [("env_leetcode.py", argv, says) for argv, says in ENVIRONMENT]


def refused(done, says):
    """Status 2, and one line that says `says`; the parser's own refusals have a box around them."""
    status, out, err = done
    assert status == 2 and "Traceback" not in err, err
    if not says.startswith("tyro: "):
        assert err.startswith("error: ") and err.count("\n") == 1, err
    assert says.removeprefix("tyro: ") in err, err


def tree(folder):
    return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*"))


@pytest.mark.parametrize("script, argv, says", REFUSED, ids=[f"{script[:5]} {argv.removeprefix(CHEAP)}" for script,
    argv, _ in REFUSED])
def test_refused_in_one_line_before_anything_is_written(server, d, script, argv, says):
    if ".png" in argv:  # where figures cannot be drawn that is what is refused
        pytest.importorskip("matplotlib")
    before, out = tree(d), server.folder / f"out{server.n}"
    argv = [word.format(d=d, out=out) for word in argv.split()]
    refused(server(script, *argv, powerless="read_only" in says or "unreadable" in says), says.format(d=d))
    assert tree(d) == before and not out.exists()


def test_a_run_in_place_is_refused_under_other_flags_and_data_and_damage(server, d):
    argv = [a.format(d=d) for a in TINY] + ["--resume", "--out-dir"]
    with open(d / "run/.lock") as lock:  # as another rank of this start has it for a moment
        fcntl.flock(lock, fcntl.LOCK_SH)
        refused(server("train_grpo.py", *argv, d / "run", "--lr", "0.5"), "lr was 0.001, is 0.5")
    for name, extra, says in (("bad_state", [], "bad_state/state.pt is damaged"),
        ("bad_log", [], "bad_log/rollouts.jsonl is damaged"), ("no_log", [], "no_log/metrics.jsonl: cannot be read"),
        ("bad_config", [], "bad_config/config.json: damaged"),
                              ("run", ["--lr", "0.5"], "lr was 0.001, is 0.5"), ("run", ["--steps", "1"], "--steps 1"),
                              ("other_data", [], "hashes was"), ("run", ["--name", "x"], "name was None, is x")):
        before = tree(d)
        refused(server("train_grpo.py", *argv, d / name, *extra), says)
        assert tree(d) == before


def test_a_hub_name_without_a_network_is_refused_at_once(server, d):
    begin = time.time()
    refused(server("train_grpo.py", "--model", "nobody/nothing", "--out-dir", d / "out"), "--model nobody/nothing")
    assert time.time() - begin < 15


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(server, d, tmp_path, name):
    argv = [*(a.format(d=d) for a in TINY), "--out-dir", tmp_path / "run", f"--{name}"]
    refused(server("train_grpo.py", *argv, without=name), f"--{name}: {name} is not installed; pip install {name}")
    assert not (tmp_path / "run").exists()


def test_plot_without_matplotlib_is_refused_before_sampling(server, d):
    before = tree(d)
    refused(server("evaluate_deploy.py", d / "run", "--plot", d / "x.png", without="matplotlib"),
        "pip install matplotlib")
    assert tree(d) == before


@pytest.mark.parametrize("script, flag", [
    ("train_grpo.py", "--lr 0.001"), ("evaluate_deploy.py", "--temperature 0.7"), ("extract_vgrad.py", "--n-haar 200"),
    ("train_grpo.py", "deployed block, with minus the standard deviation of its group's advantages as"),  # of two lines
    ("env_leetcode.py", "--problems"), ("lora2r.py", "This file is read, not run")])
def test_help(server, script, flag):
    status, out, err = server(script, *["--help"][: script != "lora2r.py"])
    assert status == 0 and flag in out and str(HERE) not in out and not err


def test_curves_and_rollouts_of_a_real_run(server, d, tmp_path):
    status, out, err = server("evaluate_deploy.py", d / "run", "--browse", tmp_path / "run.html")
    assert status == 0 and not err, err
    rollouts = (d / "run/rollouts.jsonl").read_text().splitlines()
    data = (tmp_path / "run.html").read_text().split('application/json">')[1].split("</script>")[0]
    assert json.loads(data)["rows"] == list(map(json.loads, rollouts))
    pytest.importorskip("matplotlib")
    for kind in ("curves", "plot"):
        status, out, err = server("evaluate_deploy.py", d / "run", f"--{kind}", tmp_path / f"{kind}.png")
        assert status == 0 and not err and (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG"), err


def test_accepted(server, d):
    """A BOM, problems after a BOM, pairs that hardly tell apart: these go on, the last with a warning."""
    status, out, err = server("extract_vgrad.py", "--pairs", d / "bom.md", "--rank", 4, "--n-haar", 2,
        "--rollouts", d / "good.jsonl")
    assert status == 0 and "2 pairs (sentinel 2)" in out, err
    status, out, err = server("env_leetcode.py", "--data", d / "few.jsonl")
    assert status == 0, err


def test_pairs_that_hardly_tell_apart_are_warned_of():
    import torch
    from extract_vgrad import Direction
    low, high = torch.tensor([[0.0], [1.0], [0.0], [1.0]]), torch.tensor([[2.0], [3.0], [2.0], [3.0]])
    one_low = torch.cat([high[:2], low[:2]])  # of the second mode alone
    modes = ["run_tests", "run_tests", "sentinel", "sentinel"]
    summaries = [Direction(torch.ones(1, 1), torch.zeros(1, 1), low, hack, torch.zeros(8, 1, 1), modes).summary()
                 for hack in (high, one_low)]
    assert ["warning" in text for text in summaries] == [False, True]
    assert "AUROC 0.75 (lowest: sentinel 0.50)" in summaries[1]
    assert "warning: sentinel: its pairs, held out, are told apart with an AUROC of 0.50" in summaries[1]


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


# ---- names

def test_an_arm_is_named_by_what_differs():
    from train_grpo import arm_of, check, parse_args
    names = {
        "": "routeV", "--intervention none": "none", "--routeV-random-v-seed 3 --seed 2": "placebo",
        "--steps 3 --device cpu": "routeV", "--dry-run": "routeV",
        "--intervention none --reward gt --mix-ratio 0": "none-mix-ratio-0.0-reward-gt",
        "--no-positive-only": "routeV-no-positive-only",
        "--cut-hack .1": "routeV-cut-hack-0.1", "--preset seed": "routeV-seed",
        "--preset=seed --lr .1": "routeV-seed-lr-0.1",
        "--betas .5 .9": "routeV-betas-0.5-0.9", "--modes sentinel": "routeV-modes-sentinel"}
    assert {argv: arm_of(check(parse_args(argv.split()))) for argv in names} == names


# ---- what a run leaves

def rows(folder):
    """metrics.jsonl without its times, and rollouts.jsonl."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s",
        "peak_gb")} for row in metrics], (folder / "rollouts.jsonl").read_text()


def train(server, d, out, *argv):
    status, text, err = server("train_grpo.py", *(a.format(d=d) for a in TINY), "--out-dir", out, *argv)
    assert status == 0 and not err, err
    return text


def same(one, two):
    assert rows(one) == rows(two)
    for name in ("adapter.safetensors", "deploy.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert {p.name for p in two.iterdir()} == {".lock", "config.json", "adapter.safetensors", "state.pt",
        "metrics.jsonl", "rollouts.jsonl", "deploy.json"}


def test_resume_starts_without_a_checkpoint_and_drops_torn_rows_and_left_overs(server, d, tmp_path):
    train(server, d, tmp_path / "run", "--resume")
    same(d / "run", tmp_path / "run")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(tmp_path / "run" / name, "a") as file:
            file.write('{"step": 2, "rew')
    (tmp_path / "run/.state.pt.77.tmp").write_text("left over")
    assert "torn" in train(server, d, tmp_path / "run", "--resume")
    same(d / "run", tmp_path / "run")


def test_an_older_run_is_kept_out_of_the_glob(server, d, tmp_path):
    shutil.copytree(d / "run", tmp_path / "x_seed0")
    train(server, d, tmp_path / "x_seed0")
    assert [p.name for p in tmp_path.glob("*_seed*")] == ["x_seed0"]
    same(d / "run", tmp_path / "x_seed0"), same(d / "run", tmp_path / "old/x_seed0.1")


def test_an_evaluation_says_how_it_was_made_and_replaces_no_other(server, d, tmp_path):
    """From another folder, on a copy of the run; T = 0 is the likeliest token: each sample of a problem is the same."""
    shutil.copytree(d / "run", tmp_path / "copy")
    own = (tmp_path / "copy/deploy.json").read_bytes()
    for argv, name in (("--samples 1", "deploy.json"),
                       ("--samples 3 --temperature 0", "deploy-samples3-temperature0.0.json"),
                       ("--samples 1 --seed 5", "deploy-seed5.json"),
                       (f"--samples 1 --data {d}/bom.jsonl", "deploy-data_bom_")):
        status, out, err = server("evaluate_deploy.py", tmp_path / "copy", *argv.split(), cwd=tmp_path)
        assert status == 0 and name in out, err
        path, = (tmp_path / "copy").glob(f"{name.removesuffix('.json')}*" if name.endswith("_") else name)
        settings = json.loads(path.read_text())["settings"]
        assert (settings["samples"], settings["step"], len(settings["data_hash"])) == (
            3 if "--samples 3" in argv else 1, 2, 12)
    greedy = json.loads((tmp_path / "copy/deploy-samples3-temperature0.0.json").read_text())
    for table in greedy["results"].values():
        solved = table["all"]["solve"] * table["all"]["problems"]
        assert solved == pytest.approx(round(solved), abs=1e-9) and table["all"]["compiles"] > 0
    assert (tmp_path / "copy/deploy.json").read_bytes() == own


def until(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.01)


def test_two_runs_in_one_folder_end_with_one_clear_refusal(server, d, tmp_path):
    argv = [*(a.format(d=d) for a in TINY), "--out-dir", tmp_path / "run"]
    first = server.start("train_grpo.py", *argv)
    until((tmp_path / "run/config.json").exists)
    for more in ([], ["--resume"]):
        refused(server("train_grpo.py", *argv, *more), "another run is writing there")
    assert server.wait(*first)[0] == 0
    same(d / "run", tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_how_to_go_on(server, d, tmp_path, number):
    argv = [*(a.format(d=d) for a in TINY), "--out-dir", tmp_path / "run"]
    pid, log = server.start("train_grpo.py", *argv)
    until((tmp_path / "run/metrics.jsonl").exists)  # steps are quick: after the first one it can be too late
    time.sleep(0.05)
    os.kill(pid, number)
    status, out, err = server.wait(pid, log)
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
    argv = [*(a.format(d=d) for a in TINY), "--steps", "3", "--resume", "--out-dir", tmp_path / "run"]
    before = (tmp_path / "run/state.pt").read_bytes()
    refused(server("train_grpo.py", *argv, fsize=room), "rollouts.jsonl: cannot be written")
    assert (tmp_path / "run/state.pt").read_bytes() == before
    argv = [*(a.format(d=d) for a in TINY), "--out-dir", tmp_path / "two"]  # room for the adapter, not for the moments
    room = ((d / "run/adapter.safetensors").stat().st_size + len(before)) // 2
    refused(server("train_grpo.py", *argv, fsize=room), "state.pt: cannot be written")
    assert not list((tmp_path / "two").glob(".*.tmp"))
    train(server, d, tmp_path / "two", "--resume")
    same(d / "run", tmp_path / "two")


def kill_and_resume(server, d, folder, share, seconds):
    pid, log = server.start("train_grpo.py", *(a.format(d=d) for a in TINY), "--out-dir", folder)
    time.sleep(share * seconds)
    os.kill(pid, signal.SIGKILL)
    assert server.wait(pid, log)[0] in (-signal.SIGKILL, 0)
    train(server, d, folder, "--resume")
    same(d / "run", folder)


@pytest.mark.parametrize("points", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_anywhere_and_resume_is_the_uninterrupted_run(server, d, tmp_path, points):
    begin = time.time()
    train(server, d, tmp_path / "timed")
    seconds = time.time() - begin
    for i in range(points):
        kill_and_resume(server, d, tmp_path / f"run{i}", (i + 0.5) / points, seconds)
