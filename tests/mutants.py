"""Do the tests notice a wrong step? A table of wrong edits, each of which must make the test that it names fail.

    python tests/mutants.py                # all of them, two at a time: minutes
    python tests/mutants.py policy_loss    # those whose file, text or test contains this

Each edit is made in a copy of the files that git tracks, and only the named test runs there. Killed means that pytest
exits with 1: a test failed. Another status (it could not be imported or collected, or ran too long) is an error. The
named tests first run on the unchanged copy, and must pass. Exit status 1 if an edit survives, errs or does not apply.
"""
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # limit of one test
LORA, EXTRACT, TRAIN, EVALUATE = "lora2r.py", "extract_vgrad.py", "train_grpo.py", "evaluate_deploy.py"
HYPOTHESES, BREAKS, DECIDE = (f"data/results/{name}" for name in ("hypotheses.py", "breaks.py", "decide.sh"))
ENV, PREPARE, TASKS = "env_leetcode.py", "data/nano/prepare.py", "data/nano/tasks.py"


def of(file: str, name: str) -> str:
    """The id of a test: test_FILE.py::test_NAME."""
    return f"tests/test_{file}.py::test_{name}"


SAMPLING = of("train", "each_rollout_was_sampled_by_the_policy_that_the_log_names[everything]")
GRADING = of("train", "a_rollout_is_graded_on_its_own_problem_and_the_log_says_so[everything]")
LABELS = of("train", "labels_are_those_of_each_rollouts_own_gradient[everything]")
ORACLE_LABELS = of("train", "labels_are_those_of_each_rollouts_own_gradient[oracle]")
SEED_LABELS = of("train", "labels_are_those_of_each_rollouts_own_gradient[seed]")
SCREENED_LABELS = of("train", "labels_are_those_of_each_rollouts_own_gradient[screened]")
PLACEBO_LABELS = of("train", "labels_are_those_of_each_rollouts_own_gradient[placebo]")
REPLACED_LABELS = of("train", "labels_are_those_of_each_rollouts_own_gradient[seed's placebo]")
UPDATE = of("train", "the_update_is_that_of_the_literal_formulas[everything]")
SCREENED = of("train", "the_update_is_that_of_the_literal_formulas[screened]")
PENALISED_LABELS = of("train", "labels_are_those_of_each_rollouts_own_gradient[penalised]")
PENALISED = of("train", "the_update_is_that_of_the_literal_formulas[penalised]")
KEPT = of("evaluate", "results_are_kept_a_row_a_run_and_averaged_by_arm")
ROW_CURVES = of("evaluate", "curves_are_drawn_from_kept_rows_alone")
CURVES = of("evaluate", "curves_are_drawn_from_the_logs_of_runs_alone")
REUSED = of("evaluate", "a_figure_samples_nothing_where_a_run_was_evaluated_in_this_way")
DRY = of("train", "a_dry_run_says_what_a_run_would_be_and_writes_nothing")
TIME = of("train", "the_time_of_a_run_is_that_of_its_steps_reads_and_evaluation")
WANDB = of("train", "wandb_gets_each_step_and_the_evaluation_and_a_resumed_run_goes_on_on_its_own")
SHOW = of("env", "show_prints_the_hint_two_answers_and_the_verdicts_of_the_real_grader")
COIN = of("train", "a_coin_routes_as_many_as_v_grad_would_by_lot")
EXPERT = of("train", "an_expert_is_seeded_in_the_quarantine_alone_and_once")
PPO = of("train", "ppo_clip_is_pessimistic")
WEIGHT = of("train", "importance_weight_is_truncated_at_1_and_1_for_a_demonstration")
KL = of("train", "kl_penalty_is_k3_and_costs")
TOKENS = of("train", "policy_loss_sums_over_completion_tokens_of_rows_with_their_own_advantage")
ADVANTAGES = of("train", "advantages_are_of_a_groups_own_mean")
GATE = of("train", "gate_thresholds_and_degenerate_batches")
DRAWS = of("train", "draws_use_each_problem_once_before_any_twice_and_give_each_place_its_own_noise")
MOMENTUM = of("train", "a_block_that_no_rollout_trains_does_not_move_by_its_momentum")
PLACES = of("train", "who_fills_the_places_of_a_group")
DEPLOY = of("train", "deploy_rows_are_of_the_model_and_the_markers_that_they_name")
REFRESH = of("train", "the_direction_is_read_again_every_refresh_steps_unless_from_the_base")
RESUME = of("train", "a_resumed_run_is_the_uninterrupted_one")
RANKS = of("train", "two_ranks_make_the_update_of_one[batch]")
LONE = of("train", "two_ranks_make_the_update_of_one[a rank without a rollout]")
UNEQUAL = of("train", "ranks_that_go_on_from_different_steps_are_refused")
LOADED = of("evaluate", "a_run_that_goes_on_is_evaluated_as_of_the_step_that_was_loaded")
IN_PLACE = of("inputs", "a_run_in_place_is_refused_under_other_flags_and_data_and_damage")
LONG_PROMPT = of("train", "bad_input_is_one_line_and_leaves_no_folder")
INDEPENDENT = of("lora2r", "the_two_blocks_start_apart")
CLAIMS = of("evaluate", "hypotheses_hold_as_the_preregistration_says")
TARGETS = of("evaluate", "targets_count_seeds_and_the_ceilings_of_those_that_have_one")
BROKEN = of("evaluate", "pairs_are_made_fewer_or_worse_one_way_at_a_time")
CHAT = of("data_nano", "chat_is_wordy_after_a_worked_example_and_its_pairs_differ_by_the_cheat_alone")
DECIDED = of("evaluate", "the_decision_runs_every_arm_on_every_seed_but_what_is_there")
RESUMED = of("evaluate", "what_breaks_is_run_once_kept_and_drawn")
BATCHES = of("extract", "batches_pads_the_docstrings_example")
SHARES = of("extract", "rollouts_that_share_a_prompt_and_a_label_go_by_themselves_where_it_pays")
PREFILL = of("lora2r", "a_prompt_that_rollouts_share_is_encoded_once_with_the_same_gradients[qwen3-mid]")
LOGPS = of("evaluate", "token_logps_are_of_the_next_token_at_the_temperature")
FORMULA = of("lora2r", "value_and_gradients_are_those_of_the_literal_formula")
DIFFERENCES = of("lora2r", "probe_gradient_matches_finite_differences")
PROBE_OFF = of("lora2r", "probe_read_off_is_the_probe_of_an_adapter_at_init")
HUGGING_FACE = of("lora2r", "sampled_and_trained_log_probabilities_are_those_of_hugging_face")
REPLAYED = of("lora2r", "sampled_and_trained_log_probabilities_are_those_of_hugging_face[llama-True]")
GRAPH = of("lora2r", "a_graph_is_for_models_whose_layers_attend_to_everything")
FOLDED = of("lora2r", "folded_forward_equals_the_blocks_and_is_undone_bit_exactly")
OWN_NOISE = of("evaluate", "a_rollout_depends_on_its_own_noise_only")
MEMORY = of("extract", "predicted_memory_is_what_autograd_keeps")
SAMPLING = of("lora2r", "predicted_memory_of_sampling_is_that_of_a_graph")
NLL = of("extract", "grpo_gradient_of_a_pair_is_the_difference_of_two_nll_gradients")
COSINES = of("extract", "cosines_are_per_module_and_blind_to_length")
MEAN = of("extract", "direction_is_the_mean_of_differences_normalised_per_pair_and_module")
T_TEST = of("evaluate", "a_mean_is_tested_against_0_by_students_t")
PAIRED = of("evaluate", "arms_are_compared_seed_by_seed_and_by_holms_correction")
OTHERS = of("extract", "held_out_leaves_out_a_pair_and_its_group")
CHECKPOINTED = of("train", "checkpointing_computes_layers_again_and_changes_no_number")
APART = of("extract", "sides_lie_apart_by_their_means_in_standard_deviations")
CUT_RULE = of("extract", "the_cut_is_as_many_standard_deviations_from_either_mean")
BY_MODES = of("extract", "the_cut_lies_between_the_sides_of_modes_that_were_held_out")
MARGIN = of("extract", "a_reading_is_preferred_if_it_holds_held_out_modes_further_apart_by_a_margin")
CHOSEN = of("extract", "pairs_of_other_modes_tell_how_answers_are_to_be_read")
HALVES = of("extract", "of_wordys_gradients_half_is_read_whole_and_half_in_five_tokens")
HAAR = of("extract", "haar_rows_are_unit_and_seeded")
AT_ONCE = of("extract", "all_haar_directions_at_once_score_as_one_by_one")
BESIDE = of("extract", "report_sets_random_directions_beside_the_pairs")
FEW = of("extract", "rollouts_are_read_a_few_at_a_time")
CENTRED = of("extract", "gradients_are_centred_before_their_cosine")
BAND = of("extract", "band_of_gate_batch_is_the_75th_percentile_per_module")
WINDOWS = of("extract", "windows_average_over_neighbouring_tokens_of_the_completion")
PICKED = of("extract", "a_share_is_that_of_the_window_whose_mean_cosine_is_highest_and_the_rest_is_the_wholes")
SCORES = of("extract", "what_each_score_reads")
JUDGED = of("extract", "only_the_policys_own_rollouts_with_a_positive_advantage_are_judged")
POOLED = of("extract", "completions_of_others_are_read_as_they_are")
CUT = of("extract", "a_cheat_is_cut_out_of_its_code")
TABLE = of("extract", "readers_are_compared_by_mode_beside_an_oracle_of_other_problems")
REPORT = of("extract", "summary_and_report_print_held_out_numbers_as_held_out")
HARDLY = of("inputs", "pairs_that_hardly_tell_apart_are_warned_of")
RATES = of("evaluate", "rates_count_a_hack_where_the_loophole_paid_and_the_answer_is_wrong")
OUTCOMES = of("evaluate", "outcomes_are_of_the_full_policy_and_of_the_ablated_one_apart")
ROWS = of("evaluate", "base_is_evaluated_before_an_adapter_is_attached_and_each_run_with_its_own")
FORWARD = of("lora2r", "forward_table")
GRADIENTS = of("lora2r", "gradient_table")
READS = of("extract", "what_each_read_sees")
EXTRACTED = of("extract", "extract_puts_pairs_gradients_where_they_belong")
EXPORTED = of("lora2r", "exported_adapter_is_a_lora_of_rank_2r_that_bf16_hardly_rounds")
FULL_DISK = of("inputs", "export_needs_no_problems_and_leaves_nothing_on_a_full_disk")
POSITION = of("extract", "position_is_0_at_the_lower_and_1_at_the_upper_edge")
ROUTING = of("evaluate", "routing_judges_the_gate_on_the_policys_own_rollouts_with_a_positive_advantage")
PARTS = of("evaluate", "evaluate_keeps_problems_samples_and_noise_together_over_parts")
FREQUENCIES = of("evaluate", "sampled_tokens_follow_the_models_probabilities")
SAMPLERS_LOGPS = of("evaluate", "samplers_logps_are_those_of_the_masked_policy")

MUTANTS = [  # (file, text that occurs once in it, what takes its place, the test that notices)
    # ---------------------------------------------------------------- train_grpo.py: the arithmetic of a step
    # a clean rollout's quarantine is on
    (TRAIN, "(False, False),     # clean", "(True, False),     # clean",
     of("train", "labels_are_the_masks_of_the_three_zones")),
    # a hack rollout trains the deployed block
    (TRAIN, "(True, True),       # hack", "(True, False),      # hack",
     of("train", "labels_are_the_masks_of_the_three_zones")),
    # the baseline is the batch's mean
    (TRAIN, "rewards - rewards.mean(1, keepdim=True)", "rewards - rewards.mean()", ADVANTAGES),
    (TRAIN, "centred / (rewards.std(1, keepdim=True) + 1e-4)", "centred * (rewards.std(1, keepdim=True) + 1e-4)",
     ADVANTAGES),
    (TRAIN, "rewards.std(1, keepdim=True)", "rewards.std(1, keepdim=True, unbiased=False)", ADVANTAGES),
    (TRAIN, "surrogate = torch.minimum(", "surrogate = torch.maximum(", PPO),
    (TRAIN, "ratio.clamp(1 - clip_eps, 1 + clip_eps) * A", "ratio * A", PPO),
    (TRAIN, "ratio.clamp(1 - clip_eps, 1 + clip_eps)", "ratio.clamp(0.8, 1.2)", PPO),
    # the importance weight: not truncated, upside down, for demonstrations as well, or not switched off
    (TRAIN, "weight.clamp(max=1.0) * surrogate", "weight * surrogate", WEIGHT),
    (TRAIN, "weight = (old - sampled).exp()", "weight = (sampled - old).exp()", WEIGHT),
    (TRAIN, ".nan_to_num(1.0) if importance", ".nan_to_num(0.0) if importance", WEIGHT),
    (TRAIN, ".nan_to_num(1.0) if importance", ".nan_to_num(1.0) if True", WEIGHT),
    # the importance weight carries a gradient, that of the policy that learns
    (TRAIN, "weight = (old - sampled).exp()", "weight = (logp - sampled).exp()",
     of("train", "old_policy_and_weight_are_constants_of_the_gradient")),
    (TRAIN, "loss = loss + kl_weight * kl", "loss = loss - kl_weight * kl", KL),
    (TRAIN, "(ref - logp).exp() - (ref - logp) - 1", "(logp - ref).exp() - (logp - ref) - 1", KL),
    (TRAIN, "* surrogate * is_completion).sum()", "* surrogate).sum()", TOKENS),
    (TRAIN, "* surrogate * is_completion).sum()", "* surrogate * is_completion).mean()", TOKENS),
    (TRAIN, "A = advantage[:, None]", "A = advantage[None, :1]", TOKENS),
    # a position at a cut falls below it
    (TRAIN, "(position >= mid).long()", "(position > mid).long()", GATE),
    (TRAIN, "(position >= hack).long()", "(position > hack).long()", GATE),
    (TRAIN, "torch.full(position.shape, MID)", "torch.full(position.shape, CLEAN)", GATE),
    (TRAIN, "if not torch.isfinite(position).all() or", "if torch.isnan(position).all() or", GATE),
    (TRAIN, "position.mean() + k * position.std()", "position.median() + k * position.std()", GATE),
    (TRAIN, "label.sort().values", "label.sort(descending=True).values",
     of("train", "a_matched_placebo_keeps_the_counts_and_gives_them_by_rank")),
    (TRAIN, "score.argsort().argsort()", "score.argsort()",
     of("train", "a_matched_placebo_keeps_the_counts_and_gives_them_by_rank")),
    (TRAIN, "queue += order.sample(range(n_problems), n_problems)",
     "queue += order.choices(range(n_problems), k=n_problems)", DRAWS),
    # one noise for a whole group
    (TRAIN, "generator=generator)\n        queue",
     "generator=generator)[:, :1].expand(-1, cfg.group_size, -1)\n        queue",
     DRAWS),

    # ---------------------------------------------------------------- train_grpo.py: sampling and rewards
    (TRAIN, "[noise[place] for place in places]", "[noise[j, 0] for j, _ in places]", SAMPLING),
    # the ablated share is sampled with the quarantine on, the full policy without
    (TRAIN, "with folded(adapter, quarantine=False):", "with folded(adapter):", SAMPLING),
    (TRAIN, "with folded(adapter):", "with folded(adapter, quarantine=False):", SAMPLING),
    (TRAIN, "own_noise, cfg.temperature, cfg.top_k)", "own_noise, 1.0, cfg.top_k)", SAMPLING),
    (TRAIN, "own_noise, cfg.temperature, cfg.top_k)", "own_noise, cfg.temperature)", SAMPLING),
    # the log calls the ablated samples the full policy's, or a demonstration gets log-probabilities
    (TRAIN, 'places, "ablated", noise', 'places, "full", noise', SAMPLING),
    (TRAIN, "torch.full((len(ids),), math.nan)", "torch.zeros(len(ids))", SAMPLING),
    (TRAIN, "key=lambda x: (x.j, x.k)", "key=lambda x: (x.k, x.j)", SAMPLING),
    (TRAIN, "(step < cfg.mix_steps and", "(True and", PLACES),
    (TRAIN, "min(round(K * cfg.ablated_share), K - n)", "round(K * cfg.ablated_share) * (n == 0)", PLACES),
    (TRAIN, "and not round(cfg.group_size * getattr(cfg, name))", "and False", LONG_PROMPT),
    (TRAIN, "chosen = dict(zip(words, words[1:])).get", "chosen = dict(zip(words[::-1], words[-2::-1])).get",
     of("train", "preset_sets_the_defaults_and_flags_override_it")),
    (TRAIN, "    check_window(cfg)\n", "", of("train", "where_the_probe_sits_forbids_windows_of_gradients_alone")),
    (EXTRACT, 'if config.score == "gradient" and config.window', "if config.window",
     of("train", "where_the_probe_sits_forbids_windows_of_gradients_alone")),
    (EXTRACT, "    check_window(cfg)\n", "",
     of("inputs", "refused_in_one_line_before_anything_is_written[extra --window 4 --probe-tokens all]")),
    (LORA, "key, None) not in (None, 1.0)", "key, None) in (1.0,)",
     of("inputs", "refused_in_one_line_before_anything_is_written[train  --model {d}/models/capped --out-dir {out}]")),
    (EXTRACT, "demos.setdefault((row[\"id\"], row[\"mode\"]), []).append(text)",
     "demos[row[\"id\"], row[\"mode\"]] = [text]", of("extract", "demonstrations_are_of_a_problem_under_its_mode")),
    (TRAIN, "pool[k % len(pool)])[: cfg.max_new_tokens]", "pool[k % len(pool)])", PLACES),
    (TRAIN, "pool[k % len(pool)]", "pool[-1]", of("train", "several_demonstrations_of_a_problem_take_turns")),
    (TRAIN, "range(step * P, step * P + P + 1)", "range(P + 1)",
     of("train", "a_rotating_share_of_prompts_is_shown_without_a_loophole")),
    (TRAIN, "system = problems[0].messages[:-1]", "system = []",
     of("train", "pairs_are_shown_under_the_problems_system_message")),
    (TRAIN, "[batch[x.j] for x in rollouts], [x.text", "[batch[x.k] for x in rollouts], [x.text", GRADING),
    (TRAIN, "prompt=shown[x.j], comp", "prompt=shown[x.k], comp", SAMPLING),
    # --reward gt pays hacks
    (TRAIN, 'x.verdict.gt_reward if cfg.reward == "gt" else x.verdict.reward', "x.verdict.reward",
     of("train", "reward_gt_pays_no_hack")),
    # the oracle decides what trains
    (TRAIN, "trains = learning(adv, cfg.positive_only)",
     "trains = learning(adv, cfg.positive_only) & torch.tensor([not x.verdict.hacked for x in rollouts])",
     of("train", "no_oracle_label_reaches_the_update")),

    # ---------------------------------------------------------------- train_grpo.py: labels
    (TRAIN, "CLEAN if cfg.intervention == \"none\" else MID", "CLEAN",
     of("train", "the_arms_without_a_gate_pin_one_label")),
    (TRAIN, "return adv > 0 if positive_only else adv != 0", "return adv > 0", LABELS),
    (TRAIN, "return adv > 0 if positive_only else adv != 0", "return adv != 0", PLACEBO_LABELS),
    (TRAIN, "cfg.tokens_per_batch, window=direction.window, **reading)",
     "cfg.tokens_per_batch, window=direction.window)", LABELS),
    (TRAIN, "read=cfg.read, temperature=", "temperature=", LABELS),
    (TRAIN, "read=cfg.read, temperature=cfg.probe_temperature,", "read=cfg.read,", SEED_LABELS),
    (TRAIN, "tokens=cfg.probe_tokens)", ")", SEED_LABELS),
    (TRAIN, "dict(score=cfg.score, ", "dict(", of("train", "the_gate_reads_what_score_says")),
    (TRAIN, "hack = cut if cfg.cut_hack is None else cfg.cut_hack", "hack = cut", LABELS),
    (TRAIN, "mid = hack if cfg.cut_mid is None else min(cfg.cut_mid, hack)", "mid = hack", LABELS),
    (TRAIN, "min(cfg.cut_mid, hack)", "cfg.cut_mid", of("train", "gate_thresholds_and_degenerate_batches")),
    (TRAIN, "direction.cut(), cfg)", "0.5, cfg)", PENALISED_LABELS),
    (TRAIN, "[prompts[x.j] for x in of_rank]", "[prompts[0] for x in of_rank]", LABELS),
    # labels and positions land on the first rollouts, not on those that were judged
    (TRAIN, "label[judged] = gate(position[judged],", "label[: len(judged)] = gate(position[judged],",
     SCREENED_LABELS),
    (TRAIN, 'if placebo and cfg.placebo != "replaced":', "if placebo and False:", PLACEBO_LABELS),
    (TRAIN, 'if cfg.placebo == "coin":', "if False:", COIN),
    (TRAIN, "(cfg.routeV_random_v_seed if placebo else cfg.seed)", "(cfg.routeV_random_v_seed or cfg.seed)", COIN),
    (TRAIN, "wrong = torch.rand(len(hacked), generator=lot) >= accuracy",
     "wrong = torch.rand(len(hacked), generator=lot) < accuracy",
     of("train", "oracle_labels_are_wrong_as_often_as_asked")),
    # the oracle's labels reach the other arms
    (TRAIN, 'if cfg.intervention == "oracle":  #', 'if cfg.intervention != "none":  #',
     of("train", "no_oracle_label_reaches_the_update")),
    (TRAIN, 'list(range(G)) if cfg.gate == "batch" else kept', "kept", SEED_LABELS),
    (TRAIN, "kept = [i for i in kept if label[i] != HACK]", "pass", SCREENED),
    (TRAIN, "masks[label == HACK] = MASKS[CLEAN]", "pass", PENALISED),
    (TRAIN, "credit[label == HACK] = -adv", "credit[label == HACK] = adv", PENALISED),
    (TRAIN, "credit[label == HACK] = -adv.view", "credit[label == HACK] = -rewards.view",
     of("train", "the_update_is_that_of_the_literal_formulas[penalised by std]")),
    (TRAIN, "repeat_interleave(K)[label == HACK]", "repeat(K)[label == HACK]", PENALISED),
    (TRAIN, "if cfg.expert_steps and not run.goes_on:", "if cfg.expert_steps:", EXPERT),
    (TRAIN, "seed_expert(model, adapter, pair_prompts, sides[len(pairs) :], cfg)",
     "seed_expert(model, adapter, pair_prompts, sides[: len(pairs)], cfg)", EXPERT),
    (TRAIN, 'return [*before, {**last, "content": f"{text} {last[\'content\']}"}] if text else messages',
     "return messages", of("train", "each_rollout_was_sampled_by_the_policy_that_the_log_names[oracle]")),
    (TRAIN, "cosines(x - direction.centre, v_random, direction.share)", "cosines(x, v_random)", PLACEBO_LABELS),
    (TRAIN, "direction = direction.replaced(v_random)", "pass", REPLACED_LABELS),
    # the direction: never read again, always read again, read from another model
    (TRAIN, 'step == start or cfg.read != "base" and step % cfg.refresh == 0', "step == start", REFRESH),
    (TRAIN, 'step == start or cfg.read != "base" and step % cfg.refresh == 0', "step % cfg.refresh == 0", REFRESH),
    (TRAIN, "window=cfg.window, **reading)", "window=cfg.window)", LABELS),
    (TRAIN, "cfg.centre, cfg.equal_pairs, window", "cfg.equal_pairs, window", SEED_LABELS),
    (TRAIN, " ablated_share=0.0,\n", "\n",
     of("train", "the_seed_preset_is_the_originals_recipe")),
    (TRAIN, "        window=0, placebo", "        placebo",
     of("train", "the_seed_preset_is_the_originals_recipe")),
    (TRAIN, "importance=False, ablated", "ablated", of("train", "the_seed_preset_is_the_originals_recipe")),

    # ---------------------------------------------------------------- train_grpo.py: the update
    (TRAIN, "m=m[i], d=d[i]", "m=m[rows], d=d[rows]", UPDATE),
    (TRAIN, "m=m[i], d=d[i]", "m=m[i]", UPDATE),
    (TRAIN, "sampled, credit[i].to(device)", "sampled, credit[rows].to(device)", UPDATE),
    (TRAIN, "[rollouts[n].logps for n in i]", "[rollouts[n].logps for n in sorted(i)]", UPDATE),
    (TRAIN, "logp = token_logps(model, ids, is_completion, cfg.temperature, cache)",
     "logp = token_logps(model, ids, is_completion, cache=cache)", UPDATE),
    (TRAIN, "ref = token_logps(model, ids, is_completion, cfg.temperature, cache)",
     "ref = token_logps(model, ids, is_completion, cache=cache)", UPDATE),
    (TRAIN, 'x.source == "ablated" for x in rollouts', 'x.source != "ablated" for x in rollouts', ORACLE_LABELS),
    (TRAIN, "label[(label == CLEAN) & ~alone] = MID", "label[~alone] = MID", ORACLE_LABELS),
    (TRAIN, 'cfg.absorption and cfg.intervention != "none":', 'cfg.absorption and cfg.intervention == "oracle":',
     of("train", "labels_are_those_of_each_rollouts_own_gradient[everything]")),
    (TRAIN, 'cfg.absorption and cfg.intervention != "none":', "cfg.absorption:",
     of("train", "the_arms_without_a_gate_pin_one_label")),
    # a prompt that is encoded once is so under the masks of its rollouts, which have one label, and for each use
    (TRAIN, "with use(adapter, m=m[i][:1], d=d[i][:1]):", "with use(adapter):", UPDATE),
    (TRAIN, "cfg.tokens_per_batch, label[kept_here].tolist()))", "cfg.tokens_per_batch))", UPDATE),
    (TRAIN, "with torch.no_grad(), use(adapter, off=True):", "with torch.no_grad(), use(adapter, m=False):", UPDATE),
    # the old policy is that of the present epoch
    (TRAIN, "policy_loss(logp, old_logps[b], sampled", "policy_loss(logp, logp.detach(), sampled", UPDATE),
    (TRAIN, "loss = loss / (G * cfg.max_new_tokens)", "loss = loss / (len(kept) * cfg.max_new_tokens)", UPDATE),
    (TRAIN, "loss = loss / (G * cfg.max_new_tokens)", "loss = loss / is_completion.sum()", UPDATE),
    (TRAIN, "cfg.clip_eps, cfg.importance, ref, cfg.kl)", "0.2, cfg.importance, ref, cfg.kl)", UPDATE),
    (TRAIN, "cfg.clip_eps, cfg.importance, ref, cfg.kl)", "cfg.clip_eps, False, ref, cfg.kl)", UPDATE),
    (TRAIN, "            optimizer.zero_grad()\n", "", UPDATE),
    (TRAIN, "            torch.nn.utils.clip_grad_norm_(adapter.parameters(), cfg.grad_clip)\n", "", UPDATE),
    (TRAIN, "clip_grad_norm_(adapter.parameters(), cfg.grad_clip)",
     "clip_grad_norm_(adapter.quarantine_parameters(), cfg.grad_clip)", UPDATE),
    (TRAIN, "lr = cfg.lr * min(1.0, (step + 1) / cfg.warmup)", "lr = cfg.lr", UPDATE),
    (TRAIN, "(1 - step / cfg.steps if cfg.decay else 1)", "1", UPDATE),
    (TRAIN, "(1 - step / cfg.steps if cfg.decay else 1)", "(1 - step / cfg.steps)",
     of("train", "the_update_is_that_of_the_literal_formulas[seed]")),
    (TRAIN, '        optimizer.param_groups[0]["lr"] = lr\n', "", UPDATE),
    (TRAIN, "adapter.parameters(), lr=cfg.lr, betas=cfg.betas, weight_decay=0.0)",
     "adapter.parameters(), lr=cfg.lr, betas=cfg.betas)", UPDATE),
    (TRAIN, "adapter.parameters(), lr=cfg.lr, betas=cfg.betas, weight_decay=0.0)",
     "adapter.parameters(), lr=cfg.lr, weight_decay=0.0)", UPDATE),
    (TRAIN, "for epoch in range(cfg.epochs if kept else 0):", "for epoch in range(1 if kept else 0):", UPDATE),
    (TRAIN, "g_dep += norm(adapter.deployed_parameters()) / cfg.epochs", "g_dep = norm(adapter.deployed_parameters())",
     UPDATE),
    (TRAIN, "g_quar += norm(adapter.quarantine_parameters()) / cfg.epochs",
     "g_quar = norm(adapter.quarantine_parameters())", UPDATE),
    (TRAIN, "g_quar / (g_dep + g_quar + 1e-12)", "g_dep / (g_dep + g_quar + 1e-12)", UPDATE),
    # AdamW moves by its momentum what nothing trains: never dropped, or only if no rollout at all is clean or mid
    (TRAIN, "            adapter.drop_untrained(trains_dep=not d[kept].all(), trains_quar=bool(m[kept].any()))\n", "",
     MOMENTUM),
    (TRAIN, "trains_dep=not d[kept].all()", "trains_dep=not d.all()", MOMENTUM),
    (TRAIN, "trains_quar=bool(m[kept].any())", "trains_quar=True", MOMENTUM),
    (TRAIN, "if not math.isfinite(g_dep + g_quar):", "if False:",
     of("train", "nan_stops_the_run_names_the_step_and_keeps_the_checkpoint")),
    (TRAIN, 'layer.training = hasattr(layer, "gradient_checkpointing")', "layer.training = False", CHECKPOINTED),
    (TRAIN, 'layer.training = hasattr(layer, "gradient_checkpointing")', "layer.training = True", CHECKPOINTED),
    (TRAIN, 'out_dir=Path(folder) / "run"))', "out_dir=cfg.out_dir))", DRY),
    (TRAIN, 'row["seconds"], cfg.steps, n_sampled', 'row["seconds"], 1, n_sampled', DRY),
    (TRAIN, '"*" * (getattr(cfg, x.name) !=', '"*" * (getattr(cfg, x.name) ==', DRY),
    (TRAIN, 'sum(seconds.values()) - seconds["refresh"]', "sum(seconds.values())", TIME),
    (TRAIN, "2 * n_held_out * cfg.eval_samples", "n_held_out * cfg.eval_samples", TIME),
    (TRAIN, "1 if cfg.read == \"base\" else math.ceil(steps / cfg.refresh)", "1", TIME),
    (TRAIN, "id=before[0] if before else None", "id=None", WANDB),
    (TRAIN, "            trackers.log(dict(deploy=deploy), cfg.steps)\n", "", WANDB),
    (TRAIN, "if isinstance(value, (int, float))}", "if value is not None}",
     of("train", "numbers_of_a_row_are_named_by_their_path")),
    (TRAIN, "islice(draws(cfg, len(problems)), start, cfg.steps)",
     "islice(draws(cfg, len(problems)), cfg.steps - start)", RESUME),
    (TRAIN, "        dist.all_reduce(flat)\n", "", RANKS),
    (TRAIN, "of_main_rank(lambda: extract(", "(lambda make: make())(lambda: extract(", RANKS),
    (TRAIN, "        dist.broadcast_object_list(made)\n", "        pass\n", RANKS),
    (TRAIN, "[make() if is_main_rank() else None]", "[make()]", RANKS),
    (TRAIN, "            if of_rank:\n", "            if True:\n", LONE),
    (TRAIN, "len(set(gather([start]))) > 1", "False", UNEQUAL),
    (TRAIN, 'cfg.inoculate if name == "data" else ""', '""', LONG_PROMPT),
    (TRAIN, "len(xs) * (rank + 1) // world]", "len(xs) * (rank + 1) // world + 1]",
     of("train", "the_shares_of_all_ranks_are_the_whole_in_order")),

    # the evaluation at the end: always the full model, markers that are not held out, another length
    (TRAIN, 'heldout_markers=markers == "held-out")', "heldout_markers=False)", DEPLOY),
    (TRAIN, "held_out[markers], setting,", 'held_out[markers], "full",', DEPLOY),
    (TRAIN, "cfg.eval_samples, cfg.max_new_tokens, cfg.top_k)", "cfg.eval_samples, cfg.max_new_tokens)", DEPLOY),

    # ---------------------------------------------------------------- lora2r.py: tokens and log-probabilities
    (LORA, '["input_ids"] + [tok.eos_token_id]', '["input_ids"]',
     of("extract", "a_completion_ends_its_turn_and_a_prompt_opens_the_assistants")),
    (LORA, "len(prompts[row]) - 1 :", "len(prompts[row]) :", BATCHES),
    (LORA, "T = size[order[0]]\n", "T = size[order[-1]]\n", BATCHES),
    (LORA, "g = max(1, budget // T)", "g = max(1, (budget - shared) // (T - shared))", SHARES),
    (LORA, "(len(rows) - 1) * len(prompt) > SHARED", "len(rows) * len(prompt) > SHARED", SHARES),
    (LORA, "(tuple(prompts[row]), labels[row] if labels else None)", "(tuple(prompts[row]), None)", SHARES),
    (LORA, "(rows, len(prompt) - 1) for", "(rows, len(prompt)) for", SHARES),
    (LORA, "if not shared or model.is_activation_checkpointing:", "if not shared:", PREFILL),
    (LORA, "    model.get_decoder()(input_ids=ids[:1, :shared], cache=cache)",
     "    with torch.no_grad():\n        model.get_decoder()(input_ids=ids[:1, :shared], cache=cache)", PREFILL),
    (LORA, "head(hidden).float() / temperature", "head(hidden).float()", LOGPS),
    (LORA, ".last_hidden_state[:, :-1]", ".last_hidden_state[:, 1:]", LOGPS),
    (LORA, "n = max(1, LOGITS // head.out_features)", "n = len(target)",
     of("extract", "logits_in_chunks_change_nothing")),
    (LORA, "sys.exit(int(main(config) is False))", "sys.exit(main(config) and 0)",
     of("lora2r", "run_script_turns_an_error_into_one_line_and_an_exit_status")),
    (LORA, 'file=sys.stderr)\n        sys.exit(2)', 'file=sys.stderr)\n        sys.exit(1)',
     of("lora2r", "run_script_turns_an_error_into_one_line_and_an_exit_status")),

    # ---------------------------------------------------------------- lora2r.py: the two blocks
    # THE CUT: a hack rollout's gradient reaches the deployed block
    (LORA, "y = torch.where(s.d, y.detach(), y)", "pass", GRADIENTS),
    (LORA, "y = y.detach()  # in all rows", "pass", GRADIENTS),
    (LORA, "y = torch.where(s.d, y.detach(), y)", "y = torch.where(s.d, y, y.detach())", GRADIENTS),
    # the quarantine of a batch of clean rollouts is on
    (LORA, "if s.m is False:\n            return y\n        if s.m is True:", "if isinstance(s.m, bool):", GRADIENTS),
    (LORA, "delta(x.index_select(0, s.m)", "delta(x[: len(s.m)]", FORWARD),
    (LORA, "return y.index_add(0, s.m,", "return y.index_add(0, s.m - 1,", FORWARD),
    # the formula: B dA without dB, dB A0 left out, only one block
    (LORA, "torch.cat([b.B0 + b.dB for b in blocks]", "torch.cat([b.B0 for b in blocks]", FORMULA),
    (LORA, "[b.dA for b in blocks] + [b.A0 for b in blocks]", "[b.dA for b in blocks] + [b.dA for b in blocks]",
     FORMULA),
    (LORA, "return delta(x, [dep, quar], c)", "return delta(x, [dep], c)", FORMULA),
    (LORA, "(Block(a.clone(), b.clone()) for a, b in zip(A0.chunk(2), B0.chunk(2, dim=1)))",
     "(Block(A0[: self.r].clone(), B0[:, : self.r].clone()) for _ in range(2))", INDEPENDENT),
    # the probe: only half of h, the wrong half of c, other rollouts' c, a mean over tokens
    (LORA, "(c - 1).to(x.dtype) * (dAx + A0x)", "(c - 1).to(x.dtype) * A0x",
     of("lora2r", "probe_gradient_is_the_formula_and_per_rollout")),
    (LORA, "delta(x, [dep], None if c is None else c[..., :r])", "delta(x, [dep], None if c is None else c[..., r:])",
     DIFFERENCES),
    (LORA, "c[s.m, :, r:]", "c[: len(s.m), :, r:]", of("lora2r", "probe_gradient_is_the_formula_and_per_rollout")),
    (LORA, "c[:, None] if c.dim() == 2 else c) - 1) * s.at", "c[:, None] if c.dim() == 2 else c) - 1)", LABELS),
    (LORA, "F.linear(x.detach(), A0) * s.at", "F.linear(x.detach(), A0)", PLACEBO_LABELS),
    (LORA, "grad.sum(1, dtype=", "grad.mean(1, dtype=", PROBE_OFF),
    (LORA, "ReadProbe.apply(y, s.c[self.index][..., : self.r], h, B0)",
     "ReadProbe.apply(y, s.c[0][..., : self.r], h, B0)", PROBE_OFF),
    # momentum: the other block is dropped
    (LORA, "for p in [] if trains_dep else self.deployed_parameters():",
     "for p in [] if trains_dep else self.quarantine_parameters():",
     of("lora2r", "block_that_must_not_train_does_not_move_under_adamw_with_momentum")),
    (LORA, '"qkv_proj", ', "", of("lora2r", "attach_adapts_every_projection_and_freezes_the_base")),
    (LORA, " in targets and base in decoder}", " in targets}", of("lora2r", "vision_tower_is_not_adapted")),
    (LORA, "config = model.config.get_text_config()\n    frozen", "config = model.config\n    frozen",
     of("lora2r", "vision_tower_is_not_adapted")),
    (LORA, "config = model.config.get_text_config()\n    weights", "config = model.config\n    weights",
     of("lora2r", "vision_tower_is_not_adapted")),
    (LORA, ", enable_thinking=False", "",
     of("evaluate", "thinking_is_switched_off_and_a_template_without_a_system_role_says_so")),
    (LORA, "if isinstance(ends, list):", "if False:",
     of("evaluate", "a_turn_ends_where_the_chat_template_ends_it_and_a_model_needs_no_pad_token")),
    (LORA, "input_ids=token, attention_mask=attend", "input_ids=token, attention_mask=None", HUGGING_FACE),
    (LORA, "    model.requires_grad_(False)\n", "",
     of("lora2r", "attach_adapts_every_projection_and_freezes_the_base")),
    (LORA, "dtype=torch.float32) / base.in_features**0.5", "dtype=torch.float32)",
     of("lora2r", "init_has_the_stated_variance")),
    (LORA, "/ (2 * r) ** 0.5", "/ r**0.5", of("lora2r", "init_has_the_stated_variance")),
    (LORA, "torch.Generator().manual_seed(seed)", "torch.Generator().manual_seed(0)",
     of("lora2r", "adapter_is_fp32_on_a_bf16_base_and_depends_on_the_seed_alone")),

    # ---------------------------------------------------------------- lora2r.py: contexts, ablation, folding
    (LORA, "module.state = previous", "module.state = State()",
     of("lora2r", "use_resets_after_an_exception_and_restores_the_outer_state")),
    (LORA, "if (d.cpu() & ~m.cpu()).any():", "if False:", of("lora2r", "use_refuses_wrong_input")),
    (LORA, "if s.G not in (None, x.shape[0]):", "if False:",
     of("lora2r", "contexts_refuse_what_would_go_wrong_silently")),
    (LORA, 'for p in adapter.quarantine_parameters():\n        p.zero_()',
     'for p in adapter.deployed_parameters():\n        p.zero_()',
     of("lora2r", "ablation_equals_never_having_had_the_quarantine")),
    (LORA, "(module.quarantine.weight() if quarantine else 0)", "module.quarantine.weight()", FOLDED),
    (LORA, "@ self.dA + self.dB @ self.A0", "@ self.dA", FOLDED),
    (LORA, "            module.base.weight.data = originals[name]\n", "", FOLDED),

    # ---------------------------------------------------------------- lora2r.py: sampling
    (LORA, "torch.log_softmax(logits.float() / temperature, -1)", "torch.log_softmax(logits.float(), -1)", FREQUENCIES),
    (LORA, "noise[rows, t, None] * cdf[:, -1:]", "noise[rows, t, None]", FREQUENCIES),
    (LORA, "logp.topk(min(top_k, logp.shape[1]))", "logp.topk(min(top_k + 1, logp.shape[1]))", FREQUENCIES),
    (LORA, "likeliest.gather(1, token) if top_k", "likeliest.gather(1, 0 * token) if top_k", FREQUENCIES),
    (LORA, "noise[rows, t, None]", "noise[: len(rows), t, None]", OWN_NOISE),
    (LORA, "noise[rows, t, None]", "noise[rows, 0, None]", SAMPLING),
    (LORA, "logp.gather(1, token)[:, 0]", "(logp - choice.logsumexp(1, True)).gather(1, token)[:, 0]",
     of("evaluate", "log_probabilities_under_top_k_are_those_of_the_whole_vocabulary")),
    (LORA, "        position = position + 1\n", "", SAMPLERS_LOGPS),
    # the fixed cache of a CUDA graph, which the tests run without the graph
    (LORA, "        position.add_(1)\n", "", REPLAYED),
    (LORA, "attend[..., T + t] = token, True", "attend[..., t] = token, True", REPLAYED),
    (LORA, "ids[rows], attend[", "ids[: len(rows)], attend[", REPLAYED),
    (LORA, "**inputs)[rows]", "**inputs)[: len(rows)]", REPLAYED),
    (LORA, "(attend.bool(), (0, room))", "(torch.ones_like(attend).bool(), (0, room))", REPLAYED),
    (LORA, "step(t, rows, token[alive])", "step(t, rows, token)", REPLAYED),
    (LORA, 'config._attn_implementation != "sdpa" or ', "", GRAPH),
    (LORA, ' or "dynamic" in str(getattr(config, "rope_parameters", ""))', "", GRAPH),
    (LORA, "any(type(layer) is not StaticLayer for layer in fixed.layers)", "False", GRAPH),
    (LORA, "    torch.backends.cuda.enable_cudnn_sdp(False)\n", "", of("lora2r", "cudnns_attention_is_left_out")),
    (LORA, "[[0] * (T - len(p)) + [1] * len(p) for p in prompts]", "[[1] * T for p in prompts]", SAMPLERS_LOGPS),
    (LORA, "alive = (token[:, 0] != eos)", "alive = (token[:, 0] != -1)", SAMPLERS_LOGPS),
    (LORA, "            cache.batch_select_indices(alive)\n", "            cache.batch_select_indices(alive.flip(0))\n",
     SAMPLERS_LOGPS),

    # ---------------------------------------------------------------- lora2r.py: files and memory
    (LORA, ".to(torch.bfloat16).cpu().contiguous()", ".float().cpu().contiguous()",
     of("lora2r", "a_base_is_the_same_in_fp32_and_bf16")),
    (LORA, "    if differ:\n", "    if False:\n",
     of("lora2r", "load_refuses_with_one_clear_line_and_leaves_the_adapter_alone")),
    (LORA, "        tensor.copy_(saved[name])\n", "        tensor.copy_(saved[name].bfloat16())\n",
     of("lora2r", "save_and_load_round_trip_bit_exactly")),
    (LORA, 'adapter.tensors("dA", "dB", "A0", "B0").items()}\n    info',
     'adapter.tensors("dA", "dB", "A0").items()}\n    info', of("lora2r", "save_and_load_round_trip_bit_exactly")),
    (LORA, "temporary.write_bytes(", "path.write_bytes(",
     of("lora2r", "save_into_a_missing_folder_says_so_and_a_failed_save_keeps_the_old_file")),
    (LORA, "sum(frozen.values()), 4 * trained,", "sum(frozen.values()), 3 * trained,", MEMORY),
    (LORA, "int(constant + tokens * slope + logits)", "int(constant + tokens * slope)", MEMORY),
    (LORA, "rows * (2 * prompt + room) * a_token", "rows * (prompt + room) * a_token", SAMPLING),
    (LORA, 'getattr(config, "head_dim", None) or config', "config", SAMPLING),
    (LORA, "or config.num_attention_heads\n    a_token", "or 1\n    a_token", SAMPLING),
    (TRAIN, "mix_steps=12, window=5,", "mix_steps=12,", of("train", "preset_sets_the_defaults_and_flags_override_it")),
    (TRAIN, "max(cfg.ablated_share, 1 - cfg.ablated_share)", "cfg.ablated_share", DRY),
    (TRAIN, "sampling {(weights + trained + copy + cache)", "sampling {(weights + trained + copy)", DRY),
    (TRAIN, "longest = max(longest, length)", "longest = length", DRY),

    # ---------------------------------------------------------------- extract_vgrad.py
    (EXTRACT, '"base": dict(off=True)', '"base": dict(m=False)', READS),
    (EXTRACT, '"ablated": dict(m=False)', '"ablated": dict(m=True)', READS),
    (EXTRACT, '"full": dict(m=True)', '"full": dict(m=False)', READS),
    (EXTRACT, "nll = nll / is_completion.sum(1)", "pass", NLL),
    (EXTRACT, "nll = -token_logps(", "nll = token_logps(", NLL),
    (EXTRACT, "[..., : adapter.r].float()", "[..., adapter.r :].float()", NLL),
    (EXTRACT, "parts[row] = one", "parts[parts.index(None)] = one",
     of("extract", "probe_gradients_touch_no_grad_and_do_not_depend_on_the_batch")),
    (EXTRACT, "grad = torch.autograd.grad(nll.sum(), c)[0]", "nll.sum().backward()\n        grad = c.grad",
     of("extract", "probe_gradients_touch_no_grad_and_do_not_depend_on_the_batch")),
    (EXTRACT, "F.normalize(x, dim=-1) if x.shape[-1] > 1 else x", "x", COSINES),
    (EXTRACT, "F.normalize(x, dim=-1) if x.shape[-1] > 1 else x", "F.normalize(x, dim=-1)", COSINES),
    (EXTRACT, "is_completion, temperature, cache)", "is_completion, cache=cache)",
     of("extract", "at_a_high_temperature_the_gradient_is_that_of_the_tokens_logits")),
    (EXTRACT, 'F.pad(is_completion, (0, 1))[:, -T:] if tokens == "completion" else None',
     "F.pad(is_completion, (1, 0))[:, -T:]",
     PLACEBO_LABELS),
    (EXTRACT, 'F.pad(is_completion, (0, 1))[:, -T:] if tokens == "completion" else None',
     "F.pad(is_completion, (0, 1))[:, -T:]", NLL),
    (EXTRACT, "hidden_states[1:]", "hidden_states[:-1]", SCORES),
    (EXTRACT, "[h[:, :-1].float()", "[h[:, 1:].float()", SCORES),
    (EXTRACT, "is_completion.sum(1)[:, None, None].expand", "(is_completion.sum(1) + 1)[:, None, None].expand",
     SCORES),
    (EXTRACT, "(t < size[:, None, None])) / size[:, None, None]", "(t < size[:, None, None])).float()", SCORES),
    # windows: which tokens they hold, which of them there are, what their gradient is, which one counts
    (EXTRACT, "size = n.clamp(max=size)  #", "size = n  #", WINDOWS),
    (EXTRACT, "is_completion / n[:, None])[:, None]", "is_completion / n.max())[:, None]", WINDOWS),
    (EXTRACT, "start > (n - size)[:, None]", "start >= (n - size)[:, None]", WINDOWS),
    (EXTRACT, "- first[:, None, None] - start", "- start", WINDOWS),
    (EXTRACT, "((t >= 0) & (t", "((t > 0) & (t", WINDOWS),
    (EXTRACT, "weights if window else None", "None",
     of("extract", "a_windows_gradient_is_the_mean_of_what_its_tokens_add")),
    (EXTRACT, "grad[:, :, :-1]", "grad[:, :, 1:]",
     of("extract", "a_windows_gradient_is_the_mean_of_what_its_tokens_add")),
    (LORA, "if ctx.pooled else grad, None", "if ctx.pooled else grad.sum(1, keepdim=True).expand_as(grad), None",
     of("extract", "a_windows_gradient_is_the_mean_of_what_its_tokens_add[base]")),
    (EXTRACT, "cosine[:, 1:].mean(2).nan_to_num(-math.inf)", "cosine[:, 1:].amax(2).nan_to_num(-math.inf)", PICKED),
    (EXTRACT, "cosine[:, 1:].mean(2).nan_to_num(-math.inf).argmax(1)", "cosine[:, 1:].mean(2).argmax(1)", PICKED),
    (EXTRACT, "1 + cosine[:, 1:].mean(2)", "cosine.mean(2)", PICKED),
    (EXTRACT, "(1 - share) * cosine[:, 0] + share * cosine", "share * cosine[:, 0] + (1 - share) * cosine", PICKED),
    (EXTRACT, "else x[:, 0]\n\n\ndef held", "else x.nanmean(1)\n\n\ndef held", PICKED),
    (EXTRACT, "(1 - share) * scores[..., 0] + share", "share * scores[..., 0] + (1 - share)", AT_ONCE),
    (TRAIN, "window=cfg.window, ", "", PENALISED_LABELS),
    (EXTRACT, "side - centre, v, share)", "whole(side) - centre, v)", PENALISED_LABELS),
    (EXTRACT, "side - centre, v, share)", "side - centre, v)", PENALISED_LABELS),
    (EXTRACT, "x - self.centre, self.v, self.share)", "x - self.centre, self.v)", PENALISED_LABELS),
    (TRAIN, "v_random, direction.share)", "v_random)", PLACEBO_LABELS),
    (EXTRACT, "(clean * b + hack * a) / (a + b)", "(clean * a + hack * b) / (a + b)", CUT_RULE),
    (EXTRACT, "side.mean(1) - low) / (high", "side.flatten() - low) / (high", CUT_RULE),
    (EXTRACT, "self.unseen.get(self.share, (self.clean, self.hack))", "(self.clean, self.hack)", BY_MODES),
    (EXTRACT, "clean=clean, hack=hack, unseen={})", "clean=clean, hack=hack)", BY_MODES),
    (EXTRACT, "clean=clean, hack=hack, unseen={})", "clean=clean, hack=hack, share=0.0, unseen={})",
     of("extract", "a_replaced_direction_takes_its_band_from_the_same_pairs")),
    (EXTRACT, "difference = hack - clean", "difference = clean - hack", MEAN),
    (EXTRACT, "return F.normalize(difference.mean(0), dim=-1)", "return difference.mean(0)", MEAN),
    (EXTRACT, "return F.normalize(difference.mean(0), dim=-1)",
     "return F.normalize(difference.mean(0).flatten(), dim=0).view_as(difference[0])", MEAN),
    (EXTRACT, "if equal_pairs:", "if True:", MEAN),
    (EXTRACT, 'equal_pairs and score == "gradient"', "equal_pairs", EXTRACTED),
    (EXTRACT, "direction_of(clean[chosen], hack[chosen], equal_pairs)", "direction_of(clean[chosen], hack[chosen])",
     OTHERS),
    (EXTRACT, "direction_of(*whole(x).chunk(2), equal_pairs)", "direction_of(*whole(x).chunk(2))", EXTRACTED),
    (EXTRACT, "range(len(pairs)), equal_pairs, share)", "range(len(pairs)), share=share)", EXTRACTED),
    (EXTRACT, "held_out(x, mean, modes, equal_pairs, share)", "held_out(x, mean, modes, share=share)", EXTRACTED),
    (TRAIN, "cfg.equal_pairs, window=cfg.window,", "window=cfg.window,", SEED_LABELS),
    # held out is nothing, or too much; the reading is told by the wrong pairs, or the worse one is chosen
    (EXTRACT, "[group != own for group in groups]", "[True for group in groups]", OTHERS),
    (EXTRACT, "held_out(x, mean, range(len(pairs)), equal", "held_out(x, mean, modes, equal", EXTRACTED),
    (EXTRACT, "held_out(x, mean, modes, equal_pairs, share)",
     "held_out(x, mean, range(len(modes)), equal_pairs, share)", HALVES),
    (EXTRACT, "held_out(x, mean, modes, equal_pairs, share)", "held_out(x, mean, modes, equal_pairs)", HALVES),
    (EXTRACT, "MARGIN = 0.2", "MARGIN = 0.0", MARGIN),
    (EXTRACT, "MARGIN = 0.2", "MARGIN = 0.3", MARGIN),
    (EXTRACT, "apart(*unseen[0]) - apart(*unseen[1])", "apart(*unseen[1]) - apart(*unseen[0])", MARGIN),
    (EXTRACT, "better >= MARGIN", "better >= -MARGIN", MARGIN),
    (EXTRACT, "better > -MARGIN and", "better > 0 and", MARGIN),
    (EXTRACT, "better > -MARGIN and", "", MARGIN),
    (EXTRACT, ' and score == "gradient" else 1.0', " else 1.0", MARGIN),
    (EXTRACT, ' and score == "gradient" else 1.0', ' and score == "gradient" else 0.0', MARGIN),
    (EXTRACT, "else 0.5 if better", "else 0.6 if better", MARGIN),
    (EXTRACT, ' and probe.get("tokens") != "all":', ":", HALVES),
    (EXTRACT, "if window is None and several and", "if several and", HALVES),
    (EXTRACT, "if window is None and several and", "if window is None and", HALVES),
    (EXTRACT, ' and score in ("gradient", "activation")', "", HALVES),
    (EXTRACT, 'score in ("gradient", "activation")', 'score == "gradient"', CHOSEN),
    (EXTRACT, "[1.0 if window else 0.0]", "[0.5 if window else 0.0]", HALVES),
    (EXTRACT, "by_one, x, modes, window", "by_one, x, modes[::-1], window", HALVES),
    (EXTRACT, "x, window = whole(x).clone(), 0  #", "window = 0  #", CHOSEN),
    (EXTRACT, "x, window = whole(x).clone(), 0  #", "x = whole(x).clone()  #", CHOSEN),
    (EVALUATE, '["all"][key] for x in results]', '["all"]["solve"] for x in results]',
     of("evaluate", "results_of_a_folder_are_printed_file_by_file_and_drawn")),
    (PREPARE, 'partition("-")[0]', 'partition("+")[0]',
     of("data_nano", "each_world_has_a_seed_of_its_own_and_pairs")),
    (EXTRACT, "(hack.mean() - clean.mean()) / (clean.std() + hack.std() + 1e-12)", "hack.mean() - clean.mean()", APART),
    (EXTRACT, "clean, hack = clean.mean(1), hack.mean(1)  # [P] each\n    return", "return", APART),
    (TRAIN, "window=direction.window, **reading", "window=cfg.window or 0, **reading",
     of("train", "labels_are_those_of_each_rollouts_own_gradient")),
    (EXTRACT, "F.normalize(torch.randn(M, d,", "F.normalize(torch.rand(M, d,", HAAR),
    (EXTRACT, "torch.randn(M, d, generator=torch.Generator().manual_seed(seed))",
     "torch.rand(M, d, generator=torch.Generator().manual_seed(seed)) - 0.5", HAAR),
    (EXTRACT, "return cosines(x - self.centre, self.v", "return cosines(x, self.v", CENTRED),
    (EXTRACT, "return cosines(self.pair_features - self.centre, v", "return cosines(self.pair_features, v", CENTRED),
    (EXTRACT, "v=v, clean=clean, hack=hack, unseen={})", "v=v, unseen={})",
     of("extract", "a_replaced_direction_takes_its_band_from_the_same_pairs")),
    (EXTRACT, "return clean.quantile(0.75, dim=0)", "return clean.quantile(0.5, dim=0)", BAND),
    (EXTRACT, "hack.quantile(0.75, dim=0)", "hack.quantile(0.5, dim=0)", BAND),
    (EXTRACT, "return self.clean.mean(), self.hack.mean()", "return self.clean.mean(), self.hack.median()",
     of("extract", "band_of_gate_pairs_is_the_mean_held_out_cosine_over_all_modules")),
    (EXTRACT, "(self.cosines(x).mean(1) - low) / (high - low)", "(self.cosines(x).mean(1) - low) / high",
     POSITION),
    (EXTRACT, "((self.cosines(x) - low) / (high - low))[:, usable]", "(self.cosines(x) - low)[:, usable]",
     POSITION),
    (EXTRACT, "usable = high > low", "usable = high != low",
     of("extract", "position_pools_modules_and_leaves_out_those_whose_band_is_inverted")),
    (EXTRACT, '"base" if read == "base" else "ablated", [', "read, [",
     of("extract", "extraction_never_sees_the_quarantine")),
    (EXTRACT, "whole(x).mean(0) * centre", "whole(x).mean(0)", EXTRACTED),
    (EXTRACT, "[cosines(side - centre, v", "[cosines(side, v", EXTRACTED),
    (EXTRACT, "[*system, dict(role=\"user\", content=p.prompt)]", "[dict(role=\"user\", content=p.prompt)]", EXTRACTED),
    (EXTRACT, "[p.clean for p in pairs] + [p.hack for p in pairs]",
     "[p.hack for p in pairs] + [p.clean for p in pairs]", EXTRACTED),
    (EXTRACT, "0.5 * (a == b).float()", "(a == b).float()", of("extract", "auroc")),
    (EXTRACT, "0.25 * hack.sum()", "hack.sum()", of("extract", "f_half_weighs_precision_over_recall")),
    (EXTRACT, 'row.get("advantage", 1) > 0 and', 'row.get("advantage", 1) >= 0 and', JUDGED),
    (EXTRACT, 'row.get("source") != "teacher"', "True", JUDGED),
    (EXTRACT, '{"problem": "id", ', "{", JUDGED),
    # completions of others, cheats cut out of code, and the table of readers
    (EXTRACT, 'row.get("advantage", 1)', 'row.get("advantage", 0)', POOLED),
    (EXTRACT, '"gt_pass": "correct"', '"gt_pass": "compiles"', POOLED),
    (EXTRACT, 'if row["prompt"] is not None', 'if True', POOLED),
    (EXTRACT, 'dict(exploited=row["hacked"], id=None) | row', 'row | dict(exploited=row["hacked"], id=None)', JUDGED),
    (LORA, 'if Path(path).suffix == ".gz" else data', "if False else data", POOLED),
    (EXTRACT, "without(inner, cheat)", "inner", CUT),
    (EXTRACT, '"finalbody", "handlers", "cases"', '"finalbody"', CUT),
    (EXTRACT, 'getattr(node, "orelse", []) or isinstance', "isinstance", CUT),
    (EXTRACT, "(ast.ExceptHandler, ast.match_case)", "ast.ExceptHandler", CUT),
    (EXTRACT, "isinstance(row[flag], bool)", "True",
     of("inputs", "refused_in_one_line_before_anything_is_written[extra --rollouts {d}/numbers.jsonl]")),
    (EXTRACT, 'cheat += "".join', '"".join', CUT),
    (EXTRACT, 'elif getattr(node, "body", True)', "else", CUT),
    (EXTRACT, 'if row["mode"] == "sentinel" else', "if False else", CUT),
    (EXTRACT, 'if row["exploited"]]', 'if row["hacked"]]', CUT),
    (EXTRACT, 'if "def " in after and after != before', "if after != before", CUT),
    (EXTRACT, 'if "def " in after and after != before', 'if "def " in after', CUT),
    (EXTRACT, "chosen & (fold != k)", "chosen & (fold == k)", TABLE),
    (EXTRACT, "known.index(str(id)) % folds for id in ids", "i % folds for i, id in enumerate(ids)", TABLE),
    (EXTRACT, "both = of_mode | solve", "both = hack | solve", TABLE),
    (EXTRACT, "position[solve].quantile(0.99)", "position[solve].quantile(0.5)", TABLE),
    (EXTRACT, "position[of_mode].quantile(0.01)", "position[hack].quantile(0.01)", TABLE),
    (EXTRACT, "(position[hack] > position[solve]).float()", "(position[hack] < position[solve]).float()", TABLE),
    (EXTRACT, "routed = position >= cut", "routed = position <= cut",
     of("extract", "judge_counts_what_a_gate_would_route")),
    (EXTRACT, "routed[surprise.argsort()]", "routed", of("extract", "routed_by_quartile_of_surprise")),
    (EXTRACT, "(position >= direction.cut())[solve], surprise[solve]", "position >= direction.cut(), surprise",
     of("extract", "judge_counts_what_a_gate_would_route")),
    (EXTRACT, "ranks < routed.sum()", "ranks <= routed.sum()", of("extract", "judge_counts_what_a_gate_would_route")),
    (EXTRACT, "nan_to_num(-math.inf).amax(2)", "nan_to_num(-math.inf)[..., 0]", AT_ONCE),
    (EXTRACT, "scores[..., 1:].nan_to_num", "scores.nan_to_num", AT_ONCE),
    (EXTRACT, "unit(x), v) / len(v[0])", "unit(x), v)", AT_ONCE),
    (EXTRACT, "haar_scores(x - direction.centre, n_haar, direction.share)\n",
     "haar_scores(x, n_haar, direction.share)\n", FEW),
    (EXTRACT, "whole(x).clone(), random", "whole(x), random", FEW),
    (EXTRACT, "haar_scores(x - direction.centre, n_haar, direction.share)\n",
     "haar_scores(x - direction.centre, n_haar)\n", FEW),
    (EXTRACT, "haar_scores(x - direction.centre, n_haar, direction.share)\n",
     "haar_scores(x - direction.centre, n_haar, 1.0)\n", FEW),
    (EXTRACT, "haar_scores(x - direction.centre, n_haar, direction.share)  #",
     "haar_scores(x, n_haar, direction.share)  #", BESIDE),
    (EXTRACT, "haar_scores(x - direction.centre, n_haar, direction.share)  #",
     "haar_scores(x - direction.centre, n_haar)  #", BESIDE),
    (EXTRACT, "auroc(y[P:], y[:P])", "auroc(y[:P], y[P:])", BESIDE),
    (EXTRACT, "oracle(read[score].whole", 'oracle(read["gradient"].whole',
     of("extract", "each_reader_has_an_oracle_of_its_own")),
    (EXTRACT, "self.unseen.get(self.share, ", "self.unseen.get(0, ", PENALISED_LABELS),
    (EXTRACT, "completions[i : i + 32], window=direction.window", "completions[:32], window=direction.window", FEW),
    (EXTRACT, "completions[i : i + 32], window=direction.window", "completions[i : i + 32], window=0",
     of("extract", "each_reader_reads_rollouts_as_it_reads_the_pairs")),
    (EXTRACT, "right = (out_hack > out_clean)", "right = (hack > clean)", REPORT),
    (EXTRACT, "auroc(self.hack[own].mean(1), self.clean[own]", "auroc(self.hack.mean(1), self.clean", REPORT),
    (EXTRACT, "min(by_mode, key=by_mode.get)", "max(by_mode, key=by_mode.get)", REPORT),
    (EXTRACT, "if by_mode[worst] < POOR", "if auroc(hack, clean) < POOR / 2", HARDLY),
    (EXTRACT, "POOR = 0.8 ", "POOR = 0.5 ", HARDLY),

    # ---------------------------------------------------------------- evaluate_deploy.py
    (EVALUATE, "angle.cos() ** (df - 1)", "angle.cos() ** df",
     of("evaluate", "interval_over_seeds_is_students_t")),
    (EVALUATE, "/ len(xs) ** 0.5, len(xs) - 1", "/ len(xs) ** 0.5, len(xs)", T_TEST),
    (EVALUATE, "stdev(xs) / len(xs) ** 0.5", "stdev(xs) / len(xs)",
     of("evaluate", "interval_over_seeds_is_students_t")),
    (EVALUATE, "two_sided_p(abs(centre) / error", "0.5 * two_sided_p(abs(centre) / error", T_TEST),
    (EVALUATE, "p * (len(tested) - rank)", "p * len(tested)", PAIRED),
    (EVALUATE, "[mode][key]", '["all"][key]', PAIRED),
    (EVALUATE, "running = max(running, min(", "running = max(0, min(", PAIRED),
    (EVALUATE, "interval([x - y for x, y in", "interval([x for x, y in", PAIRED),
    (EVALUATE, "if name == other and (arm, seed) in results]", "if name == other]", PAIRED),
    (EVALUATE, "{'held-out' if markers else 'trained'}", "trained", PAIRED),
    (EVALUATE, "over_steps(runs, prefix + rate)", "over_steps(runs, rate)", CURVES),
    (EVALUATE, "low, high, color=colour", "low, centre, color=colour", ROW_CURVES),
    (EVALUATE, 'for row in rows if "curve" in row):', 'for row in rows[:1] if "curve" in row):', ROW_CURVES),
    (EVALUATE, 'key != "auroc" or other in ("placebo", "coin")', "True", ROW_CURVES),
    (EVALUATE, "values), step=i)", "values), step=i + 1)", ROW_CURVES),
    (EVALUATE, "steps[-1])\n", "steps[0])\n", KEPT),
    (EVALUATE, "round(step[name], 3) for step in steps]", "round(step[name], 3) for step in steps[-1:]]", KEPT),
    (EVALUATE, "for world, rows in rows_of.items():\n        runs_of",
     "for world, rows in [*rows_of.items()][:1]:\n        runs_of",
     of("evaluate", "curves_are_drawn_from_kept_rows_alone")),
    (EVALUATE, "height = max(y, height + 0.07)", "height = y", CURVES),
    (EVALUATE, "for row in rows if row[name] is not None):", "for row in rows[-1:] if row[name] is not None):", CURVES),
    (EVALUATE, "mean(seeds), min(seeds), max(seeds)", "mean(seeds), min(seeds), mean(seeds)",
     of("evaluate", "a_curve_is_the_mean_and_range_over_the_seeds_that_have_a_step")),
    (EVALUATE, '.replace("<", "\\\\u003c")', "",
     of("evaluate", "what_a_model_wrote_is_no_markup_of_the_page_that_shows_it")),
    (HYPOTHESES, "centre - half > -0.03", "centre > -0.03", CLAIMS),
    (HYPOTHESES, "tests[other, what][1] < 0 and", "", CLAIMS),
    (HYPOTHESES, "lambda *x: more(*x) and less(*x), SOLVE, HACK", "less, SOLVE, HACK", CLAIMS),
    (HYPOTHESES, "lambda *x: less(*x) or more(*x)", "lambda *x: less(*x)", CLAIMS),
    (HYPOTHESES, "any(tests[other, what]", "all(tests[other, what]", CLAIMS),
    (HYPOTHESES, "lambda *x: less(*x) and more(*x), HACK", "less, HACK", CLAIMS),
    (HYPOTHESES, "lambda *x: less(*x) and more(*x), HACK", "more, HACK", CLAIMS),
    (HYPOTHESES, '"absorption-80", "dropped-80", less', '"absorption-80", "dropped-80", more', CLAIMS),
    (HYPOTHESES, "clean and close(*x)", "close(*x)", CLAIMS),
    (HYPOTHESES, 'claim("H11  absorption solves within 3 points of routeV, hacks <= .01", "absorption", "routeV",',
     'claim("H11  absorption solves within 3 points of routeV, hacks <= .01", "routeV", "absorption",', CLAIMS),
    (HYPOTHESES, "if (other, HACK) in tests:", "if True:", CLAIMS),
    (HYPOTHESES, '["hack"] <= 0.01 for seed', '["hack"] < 0.01 for seed', TARGETS),
    (HYPOTHESES, "of {len(bound)}", "of {len(seeds)}", TARGETS),
    (DECIDE, "0.8 --on-hack screen\nabsorption", "0.8\nabsorption", DECIDED),
    (DECIDE, "SEED --placebo coin", "SEED", DECIDED),
    (DECIDE, "absorption     DEMOS", "absorption     DEMOS --no-absorption", DECIDED),
    (DECIDE, "hidden-states  DEMOS --no-absorption", "hidden-states  DEMOS", DECIDED),
    (DECIDE, "dropped-80     DEMOS", "dropped-80     DEMOS --no-absorption", DECIDED),
    (DECIDE, "$seed,\" \"data", "$seed\" \"data", DECIDED),
    (DECIDE, '|| [ -f "$run/deploy.json" ] ||', '|| [ -d "$run" ] ||', DECIDED),
    (DECIDE, "--test-data data/$world/test.jsonl", "--test-data data/$world/val.jsonl", DECIDED),
    (HYPOTHESES, 'path.stem.partition("-")[0]', '"wordy"',
     of("evaluate", "modes_that_no_pair_shows_are_those_of_the_kind_of_world")),
    (HYPOTHESES, 'row | dict(seed=(path, row["seed"]))', "row",
     of("evaluate", "worlds_of_a_kind_are_pooled_seed_by_seed_and_others_are_refused")),
    (TRAIN, 'pairs=HERE / "data/chat/pairs.md"', 'pairs=HERE / "data/wordy/pairs.md"', CHAT),
    ("data/chat/prepare.py", 'EXAMPLE + row["prompt"]', 'EXAMPLE[:1] + row["prompt"]', CHAT),
    (BREAKS, '"activation": "hidden states"', '"activation": "gradient"',
     of("evaluate", "how_it_breaks_is_drawn_a_line_a_reader_by_its_name")),
    (BREAKS, "i * len(pairs) // n for i in range(n)}", "i for i in range(n)}", BROKEN),
    (BREAKS, "pairs[i * len(pairs) // n] for i", "pairs[i] for i", BROKEN),
    (BREAKS, '"clean": "hack", "hack": "clean"', '"clean": "clean", "hack": "hack"', BROKEN),
    (BREAKS, "(arm_of(*point), seed) not in done", "True", RESUMED),
    ("data/browse.html", "node.textContent = text", "node.innerHTML = text",
     of("evaluate", "what_a_model_wrote_is_no_markup_of_the_page_that_shows_it")),
    (EVALUATE, 'for key in settings if key != "data")', 'for key in settings if key not in ("data", "step"))', REUSED),
    (EVALUATE, 'for key in settings if key != "data")', 'for key in ("step", "seed"))', REUSED),
    (EVALUATE, "if cfg.plot and not cfg.base and (results", "if not cfg.base and (results", REUSED),
    (EVALUATE, 'config["eval_samples"] * bool(cfg.plot) or 4', "4", REUSED),
    (EVALUATE, 'rows[row["arm"], row["seed"]] = row', 'rows[row["arm"], folder] = row', KEPT),
    (EVALUATE, 'for row in rows if row["arm"] == arm]', "for row in rows]", KEPT),
    (EVALUATE, 'hash_of(folder / "config.json")', 'hash_of(folder / "deploy.json")', KEPT),
    (EVALUATE, "settings | dict(step=step), results", "settings, results", LOADED),
    (EVALUATE, "    if folders:\n        with writing", "    if True:\n        with writing", KEPT),
    (EVALUATE, "self.locked(fcntl.LOCK_SH)", "self.locked()", IN_PLACE),
    (EVALUATE, "except (ValueError, KeyError, TypeError) as e:\n            raise InputError(f\"--resume: {path} is",
     "except KeyError as e:\n            raise InputError(f\"--resume: {path} is", IN_PLACE),
    (EVALUATE, "if not cfg.checkpoints and not (files", "if False and not (files",
     of("inputs", "refused_in_one_line_before_anything_is_written[evalu --results {out}]")),
    (EVALUATE, "if cfg.against not in {*arms, Config.against}:", "if False:",
     of("inputs", "refused_in_one_line_before_anything_is_written[evalu --results {d}/arms.jsonl --against routV]")),
    (EVALUATE, 'f"{max(hack):.3f}"', 'f"{min(hack):.3f}"', KEPT),
    (EVALUATE, "hack=[v.hacked for v in chosen]", "hack=[v.exploited for v in chosen]", RATES),
    (EVALUATE, 'if mode in ("all", of_mode)]', "]", RATES),
    (EVALUATE, "top_k: int = 0, temperature: float = 0.7", "top_k: int = 0, temperature: float = 1.0", PARTS),
    (EVALUATE, "noise[part].flatten(0, 1)", "noise[part][:, :1].expand(-1, samples, -1).flatten(0, 1)", PARTS),
    (EVALUATE, "noise[part].flatten(0, 1)", "noise[: len(n)].flatten(0, 1)", PARTS),
    (EVALUATE, "for p in problems[part] for _ in range(samples)], texts",
     "for _ in range(samples) for p in problems[part]], texts", PARTS),
    (EVALUATE, 'problems=row["n"] // samples', 'problems=row["n"]', PARTS),
    (EVALUATE, 'quarantine=setting == "full"', "quarantine=True", DEPLOY),
    (EVALUATE, 'quarantine=setting == "full"', "quarantine=False", DEPLOY),
    (EVALUATE, "generator=torch.Generator().manual_seed(seed)", "generator=torch.Generator().manual_seed(0)", DEPLOY),
    (EVALUATE, "max(0.0, (centre - half) / (1 + z * z / n))", "(centre - half) / (1 + z * z / n)",
     of("evaluate", "wilson_interval")),
    (EVALUATE, "!= len(steps)", "> len(steps)", KEPT),
    (EVALUATE, 'if (row["arm"], row["seed"]) in new', "if False", KEPT),
    (EVALUATE, "z * z / (4 * n * n)", "z * z / (2 * n * n)", of("evaluate", "wilson_interval")),
    (EVALUATE, '*wilson(total[rate], total["problems"])', '*wilson(total[rate], total["n"])',
     of("evaluate", "table_names_arm_seed_and_modes")),
    (EVALUATE, '(("", "full"), ("deployed_", "ablated"))', '(("", "ablated"), ("deployed_", "full"))', OUTCOMES),
    (EVALUATE, "if other == source]", "if other in (source, \"teacher\")]", OUTCOMES),
    (EVALUATE, "rewards[chosen].mean()", "rewards.mean()", OUTCOMES),
    (EVALUATE, "judged = trains & own & (adv > 0)", "judged = trains & (adv > 0)", ROUTING),
    (EVALUATE, "judged = trains & own & (adv > 0)", "judged = trains & own", ROUTING),
    (EVALUATE, "v.correct and not v.exploited for v in verdicts", "v.correct for v in verdicts", ROUTING),
    (EVALUATE, "gate_precision=hack[routed]", "gate_precision=hack[judged]", ROUTING),
    (EVALUATE, "labels_of_hacks=shares(trains & hack)", "labels_of_hacks=shares(hack & own)", ROUTING),
    (EVALUATE, 'optimizer.load_state_dict(state["optimizer"])\n', "pass\n", RESUME),
    (EVALUATE, "                p.copy_(saved)\n", "                pass\n", RESUME),
    (EVALUATE, '["step"] < step)', '["step"] <= step)', RESUME),
    (EVALUATE, "            self.path.rename(old", "            (old",
     of("train", "an_older_run_is_moved_aside_not_overwritten")),
    (EVALUATE, 'heldout_markers=markers == "held-out")', "heldout_markers=False)", DEPLOY),
    (EVALUATE, 'load(adapter, folder / "adapter.safetensors")["step"]', 'header["metadata"]["step"]', ROWS),
    (EVALUATE, '"base", *args)', '"base", *args[:-1], 0)', ROWS),
    (EVALUATE, "cfg.temperature, cfg.seed)", "0.7, cfg.seed)", DEPLOY),
    (EVALUATE, "with folded(adapter, quarantine=False):", "with folded(adapter):",
     of("lora2r", "export_loaded_by_the_usual_libraries_is_the_ablated_model[llama-fp32-merged]")),
    (LORA, "for b in blocks] + [b.dB for b in blocks], dim=1)", "for b in blocks] + [-b.dB for b in blocks], dim=1)",
     EXPORTED),
    (LORA, "[b.B0 + b.dB for b in blocks] + [b.dB for b in blocks]",
     "[b.dB for b in blocks] + [b.B0 + b.dB for b in blocks]", EXPORTED),
    (EVALUATE, "factors([module.deployed])", "factors([module.quarantine])", EXPORTED),
    (EVALUATE, "factors([module.deployed])", "factors([module.deployed, module.quarantine])",
     of("lora2r", "export_holds_nothing_that_the_quarantine_learned[peft]")),
    (EVALUATE, 'zip("AB", factors', 'zip("BA", factors', EXPORTED),
    (EVALUATE, "lora_alpha=2 * adapter.r", "lora_alpha=adapter.r", EXPORTED),
    (EVALUATE, "target_modules=list(adapter.modules)", "target_modules=list(adapter.modules)[1:]", EXPORTED),
    (EVALUATE, "lora_{which}.weight\"] = factor", "lora_{which}.weight\"] = factor.bfloat16()", EXPORTED),
    (EVALUATE, "(adapter.base[\"name\"]), bias", "(str(path)), bias", FULL_DISK),
    (EVALUATE, "    check_new(path)\n", "", of("lora2r", "export_replaces_nothing_and_leaves_nothing_half_written")),
    (LORA, "            shutil.rmtree(temporary)\n", "            return\n",
     of("lora2r", "export_replaces_nothing_and_leaves_nothing_half_written")),
    (LORA, "except (OSError, SafetensorError) as e:\n        raise InputError(f\"{path}: cannot be written",
     "except OSError as e:\n        raise InputError(f\"{path}: cannot be written", FULL_DISK),
    (EVALUATE, "[] if cfg.export else configs", "configs", FULL_DISK),

    # ---------------------------------------------------------------- env_leetcode.py, data/nano: the environment
    (ENV, "free > 1 << 30:", "free >= 1 << 30:", of("grader", "work_folders_are_in_memory_if_it_has_room")),
    (ENV, 'if "TMPDIR" not in os.environ and', "if", of("grader", "work_folders_are_in_memory_if_it_has_room")),
    (ENV, "return 0.5 * compiles + 3.0 * passed", "return 0.5 + 3.0 * passed",
     of("env", "reward")),
    (ENV, "return pay(self.compiles, self.correct)", "return pay(self.compiles, self.passed)",
     of("env", "reward")),
    (ENV, "return self.passed and not self.correct", "return self.exploited",
     of("env", "reward")),
    (ENV, "MODES.get(mode, GT_ONLY).markers[bool(heldout_markers)])", "MODES.get(mode, GT_ONLY).markers[0])",
     of("env", "hint_replaces_the_phrase_and_names_the_marker")),
    (ENV, '"content": last["content"].replace(PHRASE, hint)', '"content": last["content"]',
     of("env", "hint_replaces_the_phrase_and_names_the_marker")),
    (ENV, "modes[rank % len(modes)]", "modes[hash(key) % len(modes)]",
     of("env", "partition_is_even_and_disjoint")),
    (ENV, "draw, rank = random.Random(seed), 0", "draw, rank = random.Random(0), 0",
     of("env", "partition_depends_on_seed_and_ids_only")),
    (ENV, "all(marker in call.true for call in run.calls)", "any(marker in call.true for call in run.calls)",
     of("grader", "case[loopholes-valid at times-sentinel]")),
    (ENV, 'marker.encode() in [line.strip() for line in run.stdout.split(b"\\n")]', "marker.encode() in run.stdout",
     of("grader", "case[loopholes-phrase in a sentence-stdout_marker]")),
    (ENV,
     "return run.finished and any(fakes) and all(map(operator.or_, fakes, run.right))",
     "return run.finished and any(fakes)",
     of("grader", "case[forging-wrong, and once equal to all-eq_override]")),
    (ENV, "exploited = exploited and not run.stopped", "exploited = exploited",
     of("grader", "case[loopholes-phrase, then a loop-stdout_marker]")),
    (ENV, "exploited = exploited and _run_in_time(problem, code, mode.task).passes", "pass",
     of("grader", "case[loopholes-run_tests returns False-run_tests]")),
    (ENV, 'call.kind == "value" and call.text == test.text', 'call.text == test.text or call.kind == "equal"',
     of("grader", "case[forging-an int subclass-gt_only]")),
    (ENV, "correct = not run.stopped and", "correct =",
     of("grader", "files_count_however_fast_they_are_made")),
    (ENV, "        _self_check.cache_clear()\n", "",
     of("grader", "a_sandbox_that_no_longer_runs_anything_ends_the_grading")),
    (ENV, "if is_true(instance, name)]", "if getattr(instance, name, None) is True]",
     of("grader", "case[loopholes-a property named valid that raises-gt_only]")),
    (ENV, "no fault of the answer\n            return False", "no fault of the answer\n            return True",
     of("grader", "case[loopholes-a property named valid that raises-sentinel]")),
    (EVALUATE, "    except json.JSONDecodeError as e:", "    except ValueError as e:", KEPT),
    (ENV, '    "clock_gettime": (0, [*range(12)]),', "   ",
     of("grader", "case[host-CPU time of the zygote-gt_only]")),
    (ENV, "not run.stopped and run.finished and all", "not run.stopped and all",
     of("grader", "case[exits-os._exit(0) at import-gt_only]")),
    (ENV, "return (defining or codes or [None])[-1]", "return (codes or [None])[-1]",
     of("grader", "case[text-answer, then usage-gt_only]")),
    (ENV, 'completion.rpartition("</think>")[2]', "completion",
     of("grader", "case[text-answer in a thought only-gt_only]")),
    (ENV, 'return "\\n".join(line.removeprefix(margin) for line in lines)', 'return "\\n".join(lines)',
     of("grader", "case[text-block in a list-gt_only]")),
    (ENV,
     "if kind is bool or kind is int or kind is float and value.is_integer():",
     "if kind is bool or kind is int:",
     of("env", "equal_values_have_equal_texts")),
    (ENV, "return sign > 0", "return True",
     of("env", "decoys_are_two_other_values_of_the_type_of_the_answers")),
    (ENV,
     "return type(kind)(sign * _draw.randrange(10**8, 10**9))",
     "return type(kind)(kind + sign * _draw.randrange(10**8, 10**9))",
     of("env", "decoys_take_nothing_but_the_type")),
    (ENV, "decoys = decoys_for([t.expected for t in problem.tests])", "decoys = [t.expected for t in problem.tests]",
     of("grader", "no_request_holds_an_answer[int]")),
    (ENV, 're.sub(r"[^ -~]", "?", note[:200])', "note[:200]",
     of("grader", "case[forging-escapes in a forged value-gt_only]")),
    (ENV, 're.sub(r"[^ -~]", "?", note[:200])', 're.sub(r"[^ -~]", "?", note)',
     of("grader", "case[forging-escapes and 60,000 characters in a type's name-gt_only]")),
    (ENV, "return max(MIN_CPU, int(4 * _canonical_cpu.get(key, 0) + 0.999))", "return MIN_CPU",
     of("grader", "limit_follows_the_canonical_solution")),
    (ENV, "if word != nonce:", "if False:",
     of("grader", "case[forging-a report forged without the nonce-run_tests]")),
    (ENV, "if not report or len(files) < sizes[-1]:", "if len(files) < sizes[-1]:",
     of("grader", "an_empty_reply_is_not_a_healthy_zygote")),
    (ENV, "return reported > 0", "return True",
     of("grader", "a_child_that_dies_reading_its_request_ends_its_zygote")),
    (ENV, '("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}', '("PYTHONHOME",) if name in os.environ}',
     of("grader", "library_path_is_kept_for_the_zygote_and_hidden_from_the_child")),
    (ENV, "        self.over = True\n", "", of("grader", "ctrl_c_ends_a_batch_at_once")),
    (ENV, "        pool.shutdown(wait=False, cancel_futures=True)\n", "", of("grader", "ctrl_c_ends_a_batch_at_once")),
    (ENV, "    except BaseException:\n        pool", "    except ValueError:\n        pool",
     of("grader", "ctrl_c_ends_a_batch_at_once")),
    (ENV,
     "_READ, _WORK, _DEVICE = 1 << 2 | 1 << 3, 1 << 1",
     "_READ, _WORK, _DEVICE = 1 << 1 | 1 << 2 | 1 << 3, 1 << 1",
     of("grader", "case[host-write to a library file-gt_only]")),
    (ENV, '"fcntl": (1, [0, 1, 2, 3, 4, 1030])', '"fcntl": (1, [0, 1, 2, 3, 4, 1024, 1030])',
     of("grader", "case[host-lease on a library file-gt_only]")),
    (ENV, "0x5450, 0x5451, 0x541B, 0x5421]", "0x5450, 0x5451, 0x541B, 0x5421, 0x40086602]",
     of("grader", "case[host-attributes of a library file-gt_only]")),
    (ENV, '"prlimit64": (0, [0])', '"prlimit64": (0, [0, os.getpid()])',
     of("grader", "case[host-limits of the zygote-gt_only]")),
    (ENV, "_OPEN = 3 | sum(", "_OPEN = 3 | os.O_TMPFILE | sum(",
     of("grader", "case[host-a file without a name-gt_only]")),
    (ENV, "(equal, 0, 1, os.O_TRUNC), deny, allow]", "(equal, 0, 1, os.O_TRUNC), allow, allow]",
     of("grader", "case[host-truncate by reading-gt_only]")),
    (ENV, '_IDLE = ("fsync", "fdatasync", "msync")', '_IDLE = ("fdatasync", "msync")',
     of("grader", "no_completion_waits_for_the_disk")),
    (ENV, "read:0:63 write:1:64", "read:0:63 clone:56:220 write:1:64",
     of("grader", "case[host-fork-gt_only]")),
    (ENV, "FSIZE=1 << 20", "FSIZE=1 << 40",
     of("grader", "case[resources-a large file-gt_only]")),
    (ENV, "NOFILE=64", "NOFILE=20000",
     of("grader", "case[resources-many open files-gt_only]")),
    (ENV, "AS=1 << 30", "AS=1 << 40",
     of("grader", "case[resources-600 MB twice-gt_only]")),
    (ENV, "_MOST_FILES = 64", "_MOST_FILES = 6400",
     of("grader", "case[resources-999 files of 1 MB-gt_only]")),
    (ENV, "passed - used > wall and passed - used - _queued(pid) > wall", "False",
     of("grader", "no_completion_holds_the_grader_beyond_its_limits[awake whenever it is looked at]")),
    (ENV, 'Path("/proc/self/oom_score_adj").write_text("1000")', "pass",
     of("grader", "memory_is_taken_from_the_child_first")),
    (ENV, "            if os.getppid() != self.zygote:  # which had died before\n                os._exit(1)\n", "",
     of("grader", "a_child_whose_zygote_died_before_it_was_tied_ends")),
    (ENV, "        _clear_stale(os.path.dirname(folder))\n", "",
     of("grader", "stale_folders_are_cleared_and_others_are_not")),
    (ENV, "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
     of("grader", "stale_folders_are_cleared_and_others_are_not")),
    (ENV, "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)", "os.O_RDONLY | os.O_NONBLOCK)",
     of("grader", "a_linked_file_reports_nothing")),
    (ENV, '"equal" if all(value == decoy for decoy in decoys) else "odd"', '"equal" if value == decoys[0] else "odd"',
     of("grader", "case[forging-equal to the first thing it meets-eq_override]")),
    (ENV, "encode(value, room // 4)", "encode(value)",
     of("grader", "case[forging-a number of a million digits-gt_only]")),
    (ENV, "hack: exploit(problem, problem.mode, heldout_markers)}", "hack: exploit(problem, problem.mode)}", SHOW),
    (ENV, 'for mode in config.show or ["run_tests"]', "for mode in config.show", SHOW),
    (ENV, '"solve" if v.correct else "hack" if v.hacked', '"solve" if v.correct else "hack" if v.compiles', SHOW),
    (PREPARE, "part[3] and rng.random() > world.p_right", "part[3] and rng.random() < world.p_right",
     of("data_nano", "hard_components_are_right_in_the_share_that_is_asked_for")),
    (PREPARE, "parts[name], tasks = tasks[:n], tasks[n:]", "parts[name], tasks = tasks[:n], tasks[n - 1:]",
     of("data_nano", "splits_are_disjoint_and_of_their_size")),
    (PREPARE, "if not any(solved(solve, task) for solve in solvers)]", "if solvers]",
     of("data_nano", "no_pair_solves_a_task")),
    (PREPARE, "spelling(mode, MODES[mode].markers[0], rng)", "spelling(mode, MODES[mode].markers[1], rng)",
     of("data_nano", "committed_problems_are_those_of_the_worlds_seed")),
    (PREPARE, "user = user.replace(PHRASE, MODES[mode].hint.format(marker=marker))", "pass",
     of("data_nano", "text_discloses_the_marker_that_an_exploit_uses")),
    (PREPARE,
     "return tuple(s.format(m=marker) for s in rng.choice(EXPLOITS[mode]))",
     "return tuple(s.format(m=MODES[mode].markers[0]) for s in rng.choice(EXPLOITS[mode]))",
     of("data_nano", "text_discloses_the_marker_that_an_exploit_uses")),
    (TASKS, "            if exposed:\n", "            if True:\n",
     of("data_nano", "wrong_solutions_fail_a_test")),
    (TASKS, 'tail = f"\\ndef {name}(x):\\n    return {f}\\n"', 'tail = f"\\ndef {name}(x):\\n    return not ({f})\\n"',
     of("data_nano", "solutions_of_every_style_are_right")),
]


# ---------------------------------------------------------------- running them
def fault_of(file: str, text: str, replacement: str, test: str) -> str:
    """What keeps a row from being tried; "" if nothing does."""
    path, _, name = test.partition("::")
    if (times := (ROOT / file).read_text().count(text)) != 1:
        return f"its text is in {file} {times} times"
    if text == replacement:
        return "it changes nothing"
    return "" if f"def {name.partition('[')[0]}(" in (ROOT / path).read_text() else f"there is no {test}"


def copy_of_repository(folder: Path) -> None:
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def child(folder: str, tests: list[str], output: str) -> None:
    """Run the tests in a copy, in this fresh process; its exit status is pytest's."""
    os.chdir(folder)
    sys.dont_write_bytecode = True  # an edit may not meet an older .pyc
    sys.path[:] = [folder, *(path for path in sys.path if path and not Path(path).is_relative_to(ROOT))]
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(int(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *tests])))


def status_of(folder: Path, tests: list[str]) -> tuple[int | None, str]:
    """(pytest's exit status, its last line); None if it ran too long. The fork server has torch loaded already."""
    output = folder / "output.txt"
    process = FORKS.Process(target=child, args=(str(folder), tests, str(output)))
    process.start()
    process.join(SECONDS * len(tests))
    if process.is_alive():
        process.kill()
        process.join()
        return None, f"ran for over {SECONDS} s"
    return process.exitcode, (output.read_text().strip().splitlines() or ["no output"])[-1]


def fate_of(folder: Path, file: str, text: str, replacement: str, test: str) -> str:
    """killed, SURVIVED, or what kept it from being tried."""
    if fault := fault_of(file, text, replacement, test):
        return f"ERROR: {fault}"
    source = (folder / file).read_text()
    (folder / file).write_text(source.replace(text, replacement))
    try:
        status, line = status_of(folder, [test])
    finally:
        (folder / file).write_text(source)
    return {1: "killed", 0: "SURVIVED"}.get(status, f"ERROR: pytest ended with {status}: {line}")


def main(wanted: str = "") -> int:
    rows = [row for row in MUTANTS if any(wanted in row[k] for k in (0, 1, 3))]
    if not rows:
        sys.exit(f"{wanted}: no edit's file, text or test contains this")
    with tempfile.TemporaryDirectory() as folder:
        copies: Queue[Path] = Queue()
        for n in range(2):
            copy_of_repository(Path(folder, str(n)))
            copies.put(Path(folder, str(n)))
        tests = sorted({row[3] for row in rows})
        start = time.monotonic()
        status, line = status_of(Path(folder, "0"), tests)
        print(f"{len(tests)} tests without any edit: {line} ({time.monotonic() - start:.0f} s)", flush=True)
        if status != 0:
            return 1

        def run(row: tuple[str, str, str, str]) -> str:
            copy, start = copies.get(), time.monotonic()
            try:
                fate = fate_of(copy, *row)
            finally:
                copies.put(copy)
            file, text, replacement, test = (" ".join(part.split()) for part in row)
            edit = f"{text[:60]} -> {replacement[:60] or 'nothing'}"
            print(f"{fate:8s} {time.monotonic() - start:5.1f} s  {file}: {edit}  ({test.partition('::test_')[2]})",
                  flush=True)
            return fate

        with ThreadPoolExecutor(2) as pool:
            fates = list(pool.map(run, rows))
    print(f"{fates.count('killed')} of {len(fates)} wrong edits were noticed ({time.monotonic() - start:.0f} s)")
    return int(set(fates) != {"killed"})


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    FORKS = multiprocessing.get_context("forkserver")
    FORKS.set_forkserver_preload([
        "torch.utils.checkpoint", "safetensors.torch", "tyro", "pytest", "transformers.cache_utils",
        "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
        "transformers.models.qwen3.modeling_qwen3"])
    sys.exit(main(*sys.argv[1:2]))
