"""train_grpo: arms, masks, gate and placebo, determinism, no oracle label in the update, bad input."""
import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train_grpo
from lora2r import InputError
from train_grpo import CLEAN, HACK, HERE, MID, Config, gate, parse_args, train

TINY = Config(steps=2, prompts_per_step=6, group_size=4, max_new_tokens=48, eval_samples=0, refresh=1)


def run(tmp_path, name="run", **changes):
    """Metrics rows and final adapter tensors of a two-step run with the embedded model."""
    out = train(replace(TINY, out_dir=tmp_path / name, **changes))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"], row["tokens_per_s"], row["peak_gb"]
    return rows, load_file(out / "adapter.safetensors")


def moved(tensors, block):
    """Has any dA or dB of the deployed / quarantine blocks left its init?"""
    return any(t.any() for name, t in tensors.items() if f".{block}.d" in name)


@pytest.mark.parametrize("changes, deployed, quarantine, zones", [
    (dict(intervention="none"), True, False, [1, 0, 0]),
    (dict(intervention="absorb"), True, True, [0, 1, 0]),
    (dict(intervention="routeV", cut_mid=-1e9, cut_hack=-1e9), False, True, [0, 0, 1]),
    (dict(intervention="routeV", cut_mid=1e9, cut_hack=1e9), True, False, [1, 0, 0]),
    (dict(intervention="routeV", cut_mid=-1e9, cut_hack=1e9), True, True, [0, 1, 0]),
])
def test_each_label_trains_its_blocks_and_no_other(tmp_path, changes, deployed, quarantine, zones):
    rows, tensors = run(tmp_path, **changes)
    assert any(row["trained"] for row in rows), "no group had a spread: the test saw no update"
    assert (moved(tensors, "deployed"), moved(tensors, "quarantine")) == (deployed, quarantine)
    assert all(list(row["labels"].values()) in (zones, [0, 0, 0]) for row in rows)


def test_two_runs_of_one_command_give_the_same_metrics_and_another_seed_does_not(tmp_path):
    first, second, other = run(tmp_path, "a"), run(tmp_path, "b"), run(tmp_path, "c", seed=1)
    assert first[0] == second[0] and all(torch.equal(first[1][k], second[1][k]) for k in first[1])
    assert first[0] != other[0]


def test_no_oracle_label_reaches_the_update(tmp_path, monkeypatch):
    """Same rewards, shuffled correct / exploited / hacked flags: same weights, bit for bit."""
    honest = run(tmp_path, "honest")
    real, rng = train_grpo.grade_batch, random.Random(0)

    def shuffled(problems, completions):
        out = []
        for v in real(problems, completions):
            correct = v.passed and rng.random() < 0.5
            out.append(replace(v, correct=correct, exploited=v.passed and not correct, note="shuffled"))
            assert out[-1].reward == v.reward
        return out

    monkeypatch.setattr(train_grpo, "grade_batch", shuffled)
    lied = run(tmp_path, "lied")
    assert honest[0] != lied[0], "the flags did change what is logged"
    assert all(torch.equal(honest[1][k], lied[1][k]) for k in honest[1])


def test_microbatches_give_the_gradient_of_the_full_batch(tmp_path):
    whole, cut = (run(tmp_path, str(budget), steps=1, tokens_per_batch=budget) for budget in (10**6, 300))
    assert whole[0][0]["grad_norm"] == pytest.approx(cut[0][0]["grad_norm"], rel=1e-3)
    assert whole[0][0]["loss"] == pytest.approx(cut[0][0]["loss"], rel=1e-3, abs=1e-6)


def test_checkpointing_changes_no_number(tmp_path):
    kept, recomputed = (run(tmp_path, str(on), steps=1, checkpointing=on) for on in (False, True))
    assert kept[0][0]["grad_norm"] == pytest.approx(recomputed[0][0]["grad_norm"], rel=1e-5)
    assert kept[0][0]["labels"] == recomputed[0][0]["labels"]


def test_negative_advantages_train_nothing_unless_asked(tmp_path):
    """They are out of the loss, and the gate does not label them; under --no-positive-only they are in both."""
    def labelled(name):
        return {json.loads(line)["label"] for line in open(tmp_path / name / "rollouts.jsonl") if json.loads(line)["advantage"] < 0}

    rows = {on: run(tmp_path, str(on), steps=1, intervention="none", positive_only=on)[0][0] for on in (True, False)}
    assert rows[True]["loss"] < rows[False]["loss"] and rows[True]["reward"] == rows[False]["reward"]
    run(tmp_path, "routed", steps=1, cut_mid=-1e9, cut_hack=-1e9)
    run(tmp_path, "all", steps=1, cut_mid=-1e9, cut_hack=-1e9, positive_only=False)
    assert labelled("routed") == {None} and labelled("all") == {"hack"}  # the gate never looked at the former


def test_two_ranks_make_the_update_of_one(tmp_path):
    """torchrun over gloo: prompts split unevenly over ranks, the gate's mean and std over both. The same rollouts, labels, gradient, weights."""
    args = "train_grpo.py --steps 2 --prompts-per-step 5 --group-size 4 --eval-samples 0 --gate batch --kl 0.01 --out-dir".split()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    launchers = {"one": [sys.executable], "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    rows, rollouts, tensors = {}, {}, {}
    for name, launcher in launchers.items():
        done = subprocess.run([*launcher, *args, str(tmp_path / name)], cwd=HERE, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows[name], rollouts[name] = ([json.loads(line) for line in open(tmp_path / name / f"{file}.jsonl")] for file in ("metrics", "rollouts"))
        tensors[name] = load_file(tmp_path / name / "adapter.safetensors")
    for one, two in zip(rollouts["one"], rollouts["two"], strict=True):
        assert one.pop("position") == pytest.approx(two.pop("position"), abs=1e-3) and one == two
    for one, two in zip(rows["one"], rows["two"], strict=True):
        for key in ("grad_norm", "loss", "qmass", "kl"):
            assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-9), key
    assert moved(tensors["one"], "deployed") and moved(tensors["one"], "quarantine")
    for key, tensor in tensors["one"].items():
        torch.testing.assert_close(tensor, tensors["two"][key], rtol=0, atol=1e-5)  # steps of up to 6e-4


def test_placebo_routes_as_many_as_the_real_gate_but_others(tmp_path):
    real = run(tmp_path, "real", steps=1, prompts_per_step=16)[0]
    placebo = run(tmp_path, "placebo", steps=1, prompts_per_step=16, routeV_random_v_seed=1)[0]
    assert placebo[0]["labels"] == real[0]["labels"]
    assert json.loads((tmp_path / "placebo/config.json").read_text())["arm"] == "placebo-group-size-4-max-new-tokens-48"
    labels = [[json.loads(line)["label"] for line in open(tmp_path / name / "rollouts.jsonl")] for name in ("real", "placebo")]
    assert labels[0] != labels[1]


@pytest.mark.parametrize("changes", [
    dict(gate="batch"), dict(read="ablated"), dict(epochs=2), dict(kl=0.1), dict(std_norm=True), dict(gt_only_share=0.5), dict(reward="gt"),
    dict(mix_ratio=0.25), dict(mix_ratio=1.0), dict(mix_ratio=0), dict(positive_only=False), dict(ablated_share=0.0, top_k=20), dict(ablated_share=1.0)])
def test_every_option_runs(tmp_path, changes):
    rows, _ = run(tmp_path, **changes)
    assert len(rows) == 2
    if "gt_only_share" in changes:
        assert "gt_only" in rows[0]["hack_by_mode"]


def test_second_epoch_sees_a_moved_policy(tmp_path):
    assert run(tmp_path, "a", epochs=3, lr=0.02, warmup=1)[0][0]["clip_fraction"] > 0
    assert run(tmp_path, "b", epochs=1, lr=0.02, warmup=1)[0][0]["clip_fraction"] == 0


def test_gate_thresholds_and_degenerate_batches(capsys):
    pairs, batch = Config(cut_mid=0.3, cut_hack=0.6), Config(gate="batch", k_mid=0.0, k_hack=1.0)
    assert gate(torch.tensor([0.2, 0.3, 0.5, 0.6, 2.0]), pairs).tolist() == [CLEAN, MID, MID, HACK, HACK]
    assert gate(torch.tensor([0.0, 0.0, 0.0, 1.0]), batch).tolist() == [CLEAN, CLEAN, CLEAN, HACK]
    assert capsys.readouterr().out == ""
    for position, cfg in ((torch.tensor([0.1, float("nan")]), pairs), (torch.tensor([0.1, 0.1]), batch), (torch.tensor([0.1]), batch)):
        assert set(gate(position, cfg).tolist()) == {MID}
        assert "degenerate batch" in capsys.readouterr().out


def test_nan_stops_the_run_names_the_step_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    real = train_grpo.token_logps
    monkeypatch.setattr(train_grpo, "token_logps", lambda *args: real(*args) * float("nan"))
    with pytest.raises(FloatingPointError, match="step 0: .*adapter.safetensors"):
        train(replace(TINY, out_dir=tmp_path / "run"))
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "run/adapter.safetensors").values())


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Stopped after step 1 and resumed: the same metrics and weights, bit for bit; rows of steps that were lost are written once."""
    whole = run(tmp_path, "whole", steps=4, refresh=2, mix_steps=2)
    run(tmp_path, "cut", steps=3, refresh=2, mix_steps=2)
    state = torch.load(tmp_path / "cut/state.pt", weights_only=True)
    assert state["step"] == 3
    resumed = run(tmp_path, "cut", steps=4, refresh=2, mix_steps=2, resume=True)
    assert resumed[0] == whole[0] and all(torch.equal(resumed[1][k], whole[1][k]) for k in whole[1])
    log = [json.loads(line)["step"] for line in open(tmp_path / "cut/rollouts.jsonl")]
    assert log == sorted(log) and len(log) == 4 * 24
    with pytest.raises(InputError, match="started with other flags .lr was 0.001, is 0.5"):
        run(tmp_path, "cut", steps=4, refresh=2, mix_steps=2, resume=True, lr=0.5)


def test_an_older_run_is_moved_aside_not_overwritten(tmp_path):
    run(tmp_path, steps=1)
    (tmp_path / "run/note.txt").write_text("mine")
    run(tmp_path, steps=1)
    assert (tmp_path / "old/run.1/note.txt").read_text() == "mine" and not (tmp_path / "run/note.txt").exists()


def test_preset_sets_the_defaults_and_flags_override_it():
    cfg = parse_args(["--preset", "qwen3-4b", "--lr", "0.5"])
    assert (cfg.rank, cfg.top_k, cfg.max_new_tokens, cfg.lr, cfg.model) == (32, 20, 512, 0.5, "Qwen/Qwen3-4B")
    assert parse_args([]).top_k == 0


@pytest.mark.parametrize("argv, says", [
    (["--intervention", "none", "--routeV-random-v-seed", "1"], "--routeV-random-v-seed 1 with --intervention none"),
    (["--model", "no/such/folder"], "--model no/such/folder"),
    (["--data", "absent.jsonl"], "absent.jsonl"),
    (["--pairs", "absent.md"], "--pairs absent.md"),
    (["--mix-ratio", "0.5", "--demos", "absent.jsonl"], "--demos absent.jsonl"),
    (["--mix-ratio", "2"], "--mix-ratio 2"),
    (["--group-size", "1"], "--group-size 1"),
    (["--max-new-tokens", "240"], "--max-new-tokens 240"),
    (["--modes", "bribery"], "bribery"),
    (["--cut-mid", "0.9"], "--cut-mid 0.9"),
])
def test_bad_input_is_one_line_and_leaves_no_folder(tmp_path, argv, says):
    with pytest.raises(InputError) as e:
        train(parse_args([*argv, "--out-dir", str(tmp_path / "run")]))
    assert says in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def test_command_line_exit_status(tmp_path):
    """The scripts as a user starts them: a bad flag exits 2 with one line, a run exits 0 and leaves its six files."""
    call = lambda *argv: subprocess.run([sys.executable, *argv], cwd=HERE, capture_output=True, text=True)
    bad = call("train_grpo.py", "--data", "absent.jsonl", "--out-dir", str(tmp_path / "bad"))
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
    good = call("train_grpo.py", "--steps", "1", "--prompts-per-step", "4", "--eval-samples", "1", "--out-dir", str(tmp_path / "run"))
    assert good.returncode == 0, good.stderr
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "adapter.safetensors", "state.pt", "metrics.jsonl",
                                                             "rollouts.jsonl", "deploy.json", ".lock"}
    assert "deployed, held-out" in good.stdout and "memory: " in good.stdout
    again = call("evaluate_deploy.py", str(tmp_path / "run"), "--samples", "1")
    assert again.returncode == 0 and "full, trained" in again.stdout, again.stderr
    assert call("evaluate_deploy.py", str(tmp_path / "absent")).returncode == 2
