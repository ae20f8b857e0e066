"""Defects of one line that somebody could make, each with the test that must notice it.

    python tests/mutants.py                     all of them; run again after a stop, it goes on
    python tests/mutants.py --only Muon "SPEC"  those whose names have one of the words
    python tests/mutants.py --list --jobs 2

By hand, in no tier of the tests. Each mutant is applied to a copy of the repository, and its tests
alone are run there. What came of it is kept in .cache/mutants.json until the mutant, the file that
it changes or the files of its tests change. Tests are found by name, whatever file they are in.
Exit code 1 if a mutant survives, no longer applies, or has a test that fails without it.

Names that begin with SPEC are the defects of SPEC section 11; its last ones, the sizes of the code
and of its functions, are no line that one could change.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TRAIN, TOOL, RULES = "train_gpt.py", "retokenize_scylla.py", "records/rules.py"
BUILDER = "records/vocabulary.py"
ALL_USE = (".pytest.ini", "tests/harness.py", "tests/references.py", "records/tests/conftest.py")
TIMEOUT = 900  # seconds for the tests of a mutant, on a machine that others load


class Mutant(NamedTuple):
    """A defect: `old`, which a file has once, becomes `new`, and `tests` fail.

    Without tests `why` says that the change has no effect.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str | tuple[str, ...]
    why: str = ""


M = Mutant
MUTANTS = (
    # SPEC section 11
    M("SPEC: a lone byte of SentencePiece counts as 3", TRAIN, '["." if model.is_byte(i)',
      r'["\ufffd" if model.is_byte(i)', "test_byte_table_of_a_sentencepiece_model"),
    M("SPEC: a lone byte of TokenMonster counts as 3", TOOL,
      "[len(token.translate(None, MARKS * marked)) for", "[len(token.translate("
      "None, MARKS * marked).decode(errors='replace').encode()) for",
      "test_trainer_calls_these_shards_exact[vocab]"),
    M("SPEC: a lossy vocabulary is accepted", TOOL,
      "require(not vocabulary.lossy,", "require(True,",
      "test_lossy_yaml_is_refused_with_its_reasons"),
    M("SPEC: recurrence has no step at which it starts", TRAIN,
      "return bool(c.repeated) and reached >= c.recur_start_step",
      "return bool(c.repeated)", "test_recurrence_due"),
    M("SPEC: repeats start from weights of their own", TRAIN, "self.copy_to_repeats()", "pass",
      "test_recurrence_switch"),
    M("SPEC: repeats are always INT5", TRAIN, '"repeat", "muon", True, 6, 1.4',
      '"repeat", "muon", True, 5, 1.4', "test_the_table_decides_bits"),
    M("SPEC: repeats are kept in bf16", TRAIN, "self.to(runtime.device)",
      "self.to(runtime.device).repeat_mlps.bfloat16()", "test_initial_values"),
    M("SPEC: matrices are orthogonalised in a block of rows for each rank", TRAIN,
      "stack.view(self.updates[stack.owner]).copy_(update)",
      "stack.view(self.updates[stack.owner]).copy_(torch.cat([newton_schulz(u, 5) for u in "
      "grads.chunk(self.runtime.world, 1)], 1))", "test_muon_of_several_ranks_is_muon_of_one"),
    M("SPEC: route is twice in one group", TRAIN,
      "alike.setdefault(param_spec(name, c)[:3], []).append(parameter)",
      'alike.setdefault(param_spec(name, c)[:3], []).extend([parameter] * (1 + ("route" in name)))',
      "test_each_parameter_in_one_group"),
    M("SPEC: late QAT touches what is stored as fp16", TRAIN,
      "bits if phase.qat and bits <= 8 else 0", "min(bits, 8) if phase.qat else 0",
      "test_qat_forward_is_the_quantized_model"),
    M("SPEC: TTT freezes vectors and scalars only", TRAIN,
      "return first_layer(name, self.model.config) >= self.config.ttt_freeze_blocks",
      "return first_layer(name, self.model.config) >= self.config.ttt_freeze_blocks or "
      "name.endswith('weight')", "test_frozen_is_frozen"),
    M("SPEC: SWA's snapshots are collected and discarded", TRAIN,
      "swa = self.swa if self.snapshots else []", "swa = []", "test_swa_mean_of_snapshots"),
    M("SPEC: clipping by the norm of gradients before their reduction", TRAIN,
      "norm = (squares + small.square().sum()).sqrt() / world",
      "norm = torch.stack([p.grad.norm() for p in self.small + self.muon.moved if p.grad is not "
      "None]).norm().view(1)", "test_clipping_on_the_global_gradient"),
    M("SPEC: the last window scores some targets twice", TRAIN, "length - np.diff(ends, prepend=0)",
      "np.where(ends > length, length - stride, 0)",
      "test_every_target_is_scored_once_with_the_longest_context"),
    M("SPEC: SmearGate crosses documents", TRAIN, "self.smear(x, starts)",
      "self.smear(x, torch.zeros_like(starts).index_fill(1, ids.new_zeros(1), True))",
      "test_document_boundaries"),
    M("SPEC: the bigram crosses documents", TRAIN, "self.bigram(ids, starts))",
      "self.bigram(ids, torch.zeros_like(starts).index_fill(1, ids.new_zeros(1), True)))",
      "test_document_boundaries"),
    M("SPEC: RoPE is rescaled beyond a length of 1024", TRAIN, "frequencies = c.rope_base ** (",
      "frequencies = (c.rope_base * max(1, length / 1024)) ** (",
      "test_rope_is_the_formula_at_every_length"),
    M("SPEC: RoPE has 1024 positions", TRAIN, "rope_table(max(c.train_seq_len, c.eval_seq_len), c)",
      "rope_table(1024, c)", "test_rope_is_the_formula_at_every_length"),
    M("SPEC: the loader reads in order", TRAIN, "return random.permutation(self.ends[-1]),",
      "return np.arange(self.ends[-1]),", "test_an_epoch_is_a_permutation_of_blocks_of_all_shards"),
    M("SPEC: training has the whole cap, without a reserve", TRAIN,
      "return max(1.0, cap_ms - CLOCK_RESERVE_MS)", "return max(1.0, cap_ms)",
      "test_every_step_follows_its_schedules"),
    M("SPEC: training stops after the step that passes the cap", TRAIN,
      "clock.expected_ms(step + self.lag) + self.reserve_ms > usable_ms(c)",
      "clock.elapsed_ms + self.reserve_ms > usable_ms(c)", "test_every_step_follows_its_schedules"),
    M("SPEC: a record may train for 600.1 s", RULES, "        if ms > CAP_MS:",
      "        if ms > CAP_MS + 500:", "test_rules_bind_everybody"),
    M("SPEC: over the size limit there is a warning only", TRAIN,
      'raise RunError(f"Total submission size', 'runtime.log.line(f"Total submission size',
      "test_over_the_size_limit"),
    M("SPEC: every mode's score has the headline's name", TRAIN,
      'log.line(f"{name}_exact val_loss:', 'log.line(f"final_int8_zlib_roundtrip_exact val_loss:',
      "test_log_lines_are_the_public_patterns"),
    # settings
    M("a default is changed", TRAIN, "matrix_lr: float = setting(0.025,",
      "matrix_lr: float = setting(0.03,", "test_preflight_02_hyperparameters"),
    M("settings that contradict each other pass", TRAIN,
      "problems += contradictions(config)\n        require", "require",
      "test_all_problems_are_reported_at_once"),
    M("lanes may start in the encoder half", TRAIN, "(layers // 2 <= lanes <= layers,",
      "(0 <= lanes <= layers,", "test_contradictions_are_named"),
    M("a resumed run may change what it trains with", TRAIN, "|train_log_every|", r"|train_\w+|",
      "test_what_changes_no_weight_may_change"),
    # ranks
    M("shares leave the last items out", TRAIN,
      "slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)",
      "slice(count // self.world * self.rank, count // self.world * (self.rank + 1))",
      "test_every_target_is_scored_once_with_the_longest_context"),
    # what CUDA alone shows
    M("CUDA computes in fp16", TRAIN, "torch.bfloat16 if self.cuda else",
      "torch.float16 if self.cuda else", "test_cuda_computes_in_bf16_and_a_cpu_in_fp32"),
    M("the softcap is computed in bf16", TRAIN, "adapted(z, h, adapters[-1]).float()",
      "adapted(z, h, adapters[-1])", "test_softcap_and_loss_are_computed_in_fp32"),
    M("FlashAttention-3 is named, another one runs", TRAIN,
      "return special.get(backend, (sdpa, dense_mask))", "return sdpa, dense_mask",
      "test_the_attention_that_is_named_is_called"),
    M("every rank takes the first GPU", TRAIN, 'listed[int(environ["LOCAL_RANK"])]', "listed[0]",
      "test_a_rank_computes_on_the_gpu_of_its_local_rank"),
    M("micro-batches of 80 GB on every GPU", TRAIN, "min(1.0, memory / 75e9)", "1.0",
      "test_micro_batches_fit_the_memory_of_a_gpu"),
    M("the host runs ahead by four steps", TRAIN, "self.lag = 2 if", "self.lag = 4 if",
      "test_two_steps_at_most_are_in_flight"),
    # data
    M("a shard may be longer than its header says", TRAIN, "size == SHARD_HEADER + 2 * count",
      "size >= SHARD_HEADER + 2 * count", "test_truncated_shards_are_refused_at_every_length"),
    M("an id as large as the vocabulary passes", TRAIN, "require(top < vocab_size",
      "require(top <= vocab_size", "test_ids_out_of_range_name_the_file"),
    M("every epoch has the same order", TRAIN, "default_rng((self.seed, epoch))",
      "default_rng((self.seed, 0))", "test_an_epoch_is_a_permutation_of_blocks_of_all_shards"),
    M("DATA_SEED is not used", TRAIN, "c.data_seed or c.seed", "c.seed",
      "test_batches_depend_on_seed_and_step_only"),
    M("all ranks read the same sequences", TRAIN, "in range(self.slice.start, self.slice.stop)]",
      "in range(self.slice.stop - self.slice.start)]",
      "test_every_rank_count_sees_the_same_global_batch"),
    M("what was read ahead is taken for any step", TRAIN, "if coming == step else", "if True else",
      "test_batches_depend_on_seed_and_step_only"),
    # bytes
    M("a leading space counts after a boundary too", TRAIN,
      "(self.has_leading_space[ids] & ~self.is_boundary[previous])", "self.has_leading_space[ids]",
      "test_byte_audit_states"),
    M("a model without a lone space is accepted", TRAIN,
      r'require(model.piece_to_id("\u2581") != model.unk_id(),', "require(True,",
      "test_useless_sentencepiece_models_are_refused_by_name"),
    M("a byte count may be off by a little", TRAIN, "require(source in (None, counted) and",
      "require((source is None or abs(source - counted) < 10) and",
      "test_byte_audit_stops_the_run"),
    M("a part of the text is audited as exact", TRAIN, '"partial" if limit < len(ids) else "exact"',
      '"exact"', "test_byte_audit_states"),
    M("a lossy tokenizer's bytes are exact", TRAIN, 'if not tokenizer.get("byte_exact"):',
      "if not tokenizer:", "test_byte_audit_states"),
    M("the first id's bytes are scored", TRAIN, "counted = int(table.base_bytes[ids[0]]) + int(",
      "counted = int(", "test_first_id_is_context_only"),
    # model
    M("initial values depend on the parameters before", TRAIN,
      'torch.manual_seed(zlib.crc32(f"{c.seed} {name}".encode()))', "pass",
      "test_runs_begin_alike_where_shapes_agree"),
    M("all matrices of a shape begin alike", TRAIN, 'f"{c.seed} {name}".encode()',
      'f"{c.seed}".encode()', "test_initial_values"),
    M("initial values without SEED", TRAIN, 'f"{c.seed} {name}".encode()', "name.encode()",
      "test_runs_begin_alike_where_shapes_agree"),
    M("a block mask with one head", TRAIN, "part.repeat(1, 32,", "part.repeat(1, 1,",
      "test_block_masks_have_a_stride_of_heads"),
    M("the hash does not wrap at 32 bits", TRAIN, "ids.to(torch.int32)", "ids.to(torch.int64)",
      "test_bigram_rows_int32"),
    M("XSA on one layer less", TRAIN, "layer >= c.num_layers - c.xsa_last_n",
      "layer > c.num_layers - c.xsa_last_n", "test_forward_equals_reference"),
    M("keys are not rotated", TRAIN, "k = rotate(norm(k), rope, self.rope_dims // 2)",
      "k = norm(k)", "test_forward_equals_reference"),
    M("attention scores over K, not its root", TRAIN, "enable_gqa=grouped)",
      "enable_gqa=grouped, scale=1 / q.size(-1))", "test_sdpa_equals_softmax"),
    M("attention sees the future", TRAIN, "is_causal=mask is None,", "is_causal=False,",
      "test_causality_every_position"),
    M("FlashAttention sees the future", TRAIN, "flash_attn_func(q, k, v, causal=True)",
      "flash_attn_func(q, k, v, causal=False)", "test_flash_attention_3_dispatch"),
    M("routes between lanes are swapped", TRAIN,
      "lane_a + r[0] * a + r[2] * m, lane_m + r[1] * a + r[3] * m",
      "lane_a + r[0] * a + r[1] * m, lane_m + r[2] * a + r[3] * m",
      "test_forward_equals_reference"),
    M("skips are added in the order in which they were stored", TRAIN, "* stored.pop()",
      "* stored.pop(0)", "test_forward_equals_reference"),
    M("repeats run with the MLPs of their bases", TRAIN,
      "block.mlp if run.repeat is None else self.repeat_mlps[run.repeat]", "block.mlp",
      "test_forward_equals_reference"),
    M("the block is repeated after its first layer", TRAIN,
      "i == max(c.recur_layers, default=None)", "i == min(c.recur_layers, default=None)",
      "test_layer_plan_record"),
    M("logits have no softcap", TRAIN,
      "return cap * torch.tanh(z / cap) +", "return z +", "test_forward_equals_reference"),
    M("tables sum their gradients in bf16", TRAIN, "F.embedding(ids, self.values()).to(self.dtype)",
      "F.embedding(ids, self.values().to(self.dtype))", "test_tables_sum_their_gradients_in_fp32"),
    # optimization
    M("Newton-Schulz: another second coefficient", TRAIN, "3.4445, -4.7750,",
      "3.4445, -4.7570,",
      "test_muon_equals_formula"),
    M("Muon without Nesterov", TRAIN, "update = grads.add_(buffer, alpha=momentum)",
      "update = buffer", "test_muon_equals_formula"),
    M("repeats do not get the momentum", TRAIN, "found[second].copy_(found[first])",
      "found[second].copy_(found[second])", "test_recurrence_switch"),
    M("vectors are decayed", TRAIN, "weight_decay=c.adam_wd * decay)", "weight_decay=c.adam_wd)",
      "test_each_parameter_in_one_group"),
    M("small projections are Muon's", TRAIN, '"projection", "scalar", True, 16',
      '"projection", "muon", True, 16', "test_each_parameter_in_one_group"),
    M("gradients of ranks are summed", TRAIN, ".clamp(max=1.0) / world", ".clamp(max=1.0)",
      "test_clipping_on_the_global_gradient"),
    M("micro-batches are summed", TRAIN, "loss = self.forward(x, y).mean() / self.accumulation",
      "loss = self.forward(x, y).mean()", "test_accumulation_equals_larger_micro_batch"),
    M("the EMA's decay is not warmed up", TRAIN,
      "decay = min(self.config.ema_decay, (1 + step) / (10 + step))",
      "decay = self.config.ema_decay", "test_ema_closed_form"),
    # levers of the frontier
    M("a gate of heads reads the last dimensions", TRAIN, "x[..., : self.gate.size(1)]",
      "x[..., -self.gate.size(1) :]", "test_forward_equals_reference"),
    M("a gate of heads without its half", TRAIN, "torch.sigmoid(0.5 * gate)",
      "torch.sigmoid(gate)", "test_forward_equals_reference"),
    M("skips pass the gate of another layer", TRAIN, "torch.sigmoid(self.skip_gates[run.skip])",
      "torch.sigmoid(self.skip_gates[0])", "test_forward_equals_reference"),
    M("softcaps are those of the other sign", TRAIN, "torch.where(z > 0, *self.softcap)",
      "torch.where(z < 0, *self.softcap)", "test_softcaps_are_those_of_their_signs"),
    M("softcaps are trained", TRAIN, 'self.config).optimizer != "ttt"',
      'self.config).optimizer != ""', "test_ttt_alone_trains_the_softcaps"),
    M("softcaps are trained once TTT was compiled", TRAIN,
      "prime()\n            self.model.train_only(self.model.is_trained)",
      "prime()\n            self.model.requires_grad_(True)",
      "test_ttt_alone_trains_the_softcaps"),
    M("a document sees the one before it", TRAIN,
      "document[:, :, None] == document[:, None]", "document[:, :, None] <= document[:, None] + 1",
      "test_document_boundaries"),
    M("FlexAttention sees other documents", TRAIN,
      "(query >= key) & (document[b, query] == document[b, key])", "query >= key",
      "test_document_attention_equals_softmax"),
    M("FlashAttention-3 takes the batch for one document", TRAIN,
      "return places.where(starts.flatten(), starts.numel()).sort()",
      "return places.where(places < 1, starts.numel()).sort()",
      "test_document_attention_equals_softmax"),
    M("documents without room see each other", TRAIN, "out.where(inside[:, None, None], math.nan)",
      "out.where(inside[:, None, None], 0.0)", "test_bounds_have_room_or_say_so"),
    M("further passes keep to one repeat's MLP", TRAIN,
      "for n, j in enumerate(c.repeated)]",
      "for n, j in [(n % len(c.recur_layers), j) for n, j in enumerate(c.repeated)]]",
      "test_forward_equals_reference"),
    M("one pass is a recurrence", TRAIN, "self.recur_layers * (self.recur_passes - 1)",
      "self.recur_layers * max(1, self.recur_passes - 1)", "test_recurrence_due"),
    M("weight decay tapers with the rate", TRAIN, "scale * self.config.matrix_lr, taper)",
      "scale * taper * self.config.matrix_lr)", "test_muon_taper"),
    M("the taper is late by a lag", TRAIN, "muon_taper(step, now, c))",
      "muon_taper(step - 2, 0, c))", "test_every_step_follows_its_schedules"),
    M("a share of warmdown is one of the steps alone", TRAIN,
      "left = 1 - share_of_run(step, elapsed_ms, c)", "left = 1 - step / c.iterations",
      "test_lr_scale"),
    M("polar repeats its first triple", TRAIN, "triples[min(step, len(triples) - 1)]",
      "triples[0]", "test_muon_equals_formula"),
    M("polar without its margin", TRAIN, "(8.386464, -24.369650, 17.725117)",
      "(8.470329, -25.108075, 18.629276)", "test_polar_triples_are_minimax"),
    M("the first of several presets wins", TRAIN, "for name in names for field,",
      "for name in reversed(names) for field,", "test_presets_combine"),
    M("an artifact forgets how many passes", TRAIN, 'SETTINGS.index("train_batch_tokens")]',
      'SETTINGS.index("recur_passes")]', "test_an_artifact_names_what_makes_its_model"),
    M("an artifact says how it was trained", TRAIN, 'SETTINGS.index("train_batch_tokens")]',
      'SETTINGS.index("micro_batch_tokens")]', "test_an_artifact_names_what_makes_its_model"),
    M("a run that ended early stores passes that it has not", TRAIN,
      'dict(RECUR_LAYERS="", RECUR_PASSES="1")', 'dict(RECUR_LAYERS="")',
      "test_a_run_that_ends_before_recurrence_stores_no_repeats"),
    M("documents without boundaries are accepted", TRAIN,
      "require(not c.doc_attention or table.is_boundary[ids].any(),",
      "require(not c.doc_attention or table.is_boundary.any(),",
      "test_document_attention_needs_boundaries"),
    M("training sees other documents", TRAIN, "if self.document_mask else ()",
      "if self.document_mask and not torch.is_grad_enabled() else ()",
      "test_forward_equals_reference"),
    M("gates do not learn through what they read", TRAIN, "F.linear(x[..., : self.gate.size(1)],",
      "F.linear(x[..., : self.gate.size(1)].detach(),", "test_gradients_are_those_of_the_loss"),
    M("gated skips pass no gradient", TRAIN, "weight.to(x0.dtype) * stored.pop()",
      "weight.to(x0.dtype) * stored.pop().detach()", "test_gradients_are_those_of_the_loss"),
    M("a window's first document has no start", TRAIN, "(self.document_mask(starts),)",
      "(self.document_mask(self.is_boundary[ids]),)",
      "test_a_model_is_the_same_with_each_attention"),
    M("GPTQ's hooks run FlexAttention unfused", TRAIN, 'if backend == "flex" and self.compiles:',
      "if False:", "test_flex_is_compiled_for_what_runs_eagerly"),
    M("combined presets build no demo", TRAIN, 'if "demo" in c.preset and c.data_path',
      'if c.preset == ("demo",) and c.data_path', "test_the_demo_s_data_are_built_for_its_preset"),
    M("an artifact is scored with another attention", TRAIN,
      "not complete or config.doc_attention == c.doc_attention,", "True,",
      "test_an_artifact_names_its_attention"),
    M("frozen parameters are reduced over ranks", TRAIN,
      "return [p for p in self.parameters() if p.requires_grad]", "return [*self.parameters()]",
      "test_training_is_the_formula"),
    M("a dense mask is tried beside FlexAttention", TRAIN,
      "SDPA_KERNELS[0 if c.doc_attention else 2 :]", "SDPA_KERNELS[2:]",
      "test_the_fastest_kernels_are_chosen"),
    # schedules, clock, loop
    M("MIN_LR is a floor, not an end", TRAIN, "return c.min_lr + (1 - c.min_lr) * share",
      "return max(c.min_lr, share)", "test_lr_scale"),
    M("warmdown by steps although there is a clock", TRAIN, "if step_ms > 0:", "if False:",
      "test_lr_scale"),
    M("recurrence starts a step late", TRAIN, "reached >= c.recur_start_step",
      "reached > c.recur_start_step", "test_recurrence_due"),
    M("warmdown leaves no time for the calibration", TRAIN, "step_ms + self.reserve_ms\n",
      "step_ms\n", "test_every_step_follows_its_schedules"),
    M("schedules ignore the steps in flight", TRAIN, " + self.lag * self.facts.step_ms", "",
      "test_every_step_follows_its_schedules"),
    M("momentum is that of the next step", TRAIN, "scale, muon_momentum(step, c),",
      "scale, muon_momentum(step + 1, c),", "test_every_step_follows_its_schedules"),
    M("the average is that of the next step", TRAIN, "self.average.update(step, scale)",
      "self.average.update(step + 1, scale)", "test_every_step_follows_its_schedules"),
    M("the average is taken before the update", TRAIN,
      "        facts = self.optimizer.step(facts, scale, muon_momentum(step, c), muon_taper(step, "
      "now, c))\n        self.average.update(step, scale)\n",
      "        self.average.update(step, scale)\n        facts = self.optimizer.step(facts, scale, "
      "muon_momentum(step, c), muon_taper(step, now, c))\n",
      "test_every_step_follows_its_schedules"),
    M("late QAT ends when the rate rises again", TRAIN, "self.phase.qat or scale <", "scale <",
      "test_every_step_follows_its_schedules"),
    M("a later step takes back that it is late", TRAIN, "late=self.facts.late + facts.late",
      "late=facts.late", "test_every_step_follows_its_schedules"),
    M("the time of a validation is training time", TRAIN,
      "step_avg=train_ms / max(self.steps, 1))\n        self.clock.resume()",
      "step_avg=train_ms / max(self.steps, 1))", "test_every_step_follows_its_schedules"),
    M("no time is kept for the calibration", TRAIN,
      "self.reserve_ms = CALIBRATION_MARGIN * self.hessians()[1]", "self.hessians()",
      "test_every_step_follows_its_schedules"),
    M("the steps of the warm-up stay in the weights", TRAIN,
      "torch._foreach_copy_(self.params, saved)\n        if c.quant", "pass\n        if c.quant",
      "test_warm_up_changes_nothing"),
    M("the warm-up reads validation tokens", TRAIN,
      "self.backward(*runtime.random_tokens(*shape, random))",
      "self.backward(*self.evaluator.tokens(np.arange(9), self.micro_seqs * self.accumulation))",
      "test_warm_up_sees_no_validation_token"),
    M("calibration is outside the clock", TRAIN, "self.clock.elapsed_ms += milliseconds", "pass",
      "test_every_step_follows_its_schedules"),
    M("calibration on the first sequences of training", TRAIN,
      "self.steps * self.loader.batch_seqs", "0", "test_calibration_reads_on"),
    M("weights that are not averaged are exported", TRAIN,
      "weights, hessians = self.average.store(), {}", 'weights, hessians = "ema", {}',
      "test_calibration_reads_on"),
    M("an infinite gradient passes", TRAIN, "math.isfinite(facts.loss + facts.grad_norm)",
      "math.isfinite(facts.loss)", "test_non_finite_keeps_the_last_checkpoint"),
    # quantization
    M("one code too many", TRAIN, "return 2 ** (bits - 1) - 1", "return 2 ** (bits - 1)",
      "test_qat_grid_is_the_stored_grid"),
    M("QAT has scales in fp32", TRAIN,
      "(scales.half().view(torch.int16) & 0x7FFF).view(torch.float16).float()", "scales.abs()",
      "test_qat_grid_is_the_stored_grid"),
    M("QAT's gradient is that of rounding", TRAIN, "return weight + (round_to_grid(",
      "return 0 * weight + weight.detach() + (round_to_grid(", "test_qat_grid_is_the_stored_grid"),
    M("QAT has no steps of the fit", TRAIN,
      "fake_quantize(self.weight, self.qat_bits, self.qat_step)",
      "fake_quantize(self.weight, self.qat_bits)", "test_qat_computes_with_what_is_stored"),
    M("INT6 layers are the first ones only", TRAIN,
      'not edge <= int(match["layer"]) < c.num_layers - edge', 'not edge <= int(match["layer"])',
      "test_the_table_decides_bits"),
    M("GPTQ goes by ascending diagonal", TRAIN, "dim=1, descending=True, stable=True)",
      "dim=1, descending=False, stable=True)", "test_gptq_is_its_definition"),
    M("GPTQ is damped by 10 %", TRAIN, "hessian / mean + 0.01 * eye", "hessian / mean + 0.1 * eye",
      "test_gptq_is_its_definition"),
    M("GPTQ makes up for nothing beyond its block", TRAIN, "upper[:, start:stop, stop:], alpha=-1)",
      "upper[:, start:stop, stop:], alpha=0)", "test_gptq_is_its_definition"),
    M("second passes are not calibrated", TRAIN, "total.addmm_(x.mT, x)", "total.copy_(x.mT @ x)",
      "test_hessians_are_those_of_the_inputs"),
    M("weights that are not finite are exported", TRAIN, "require(torch.isfinite(tensor).all(), f",
      "require(True, f", "test_values_that_are_not_finite_are_not_exported"),
    M("the fit does not count the code", TRAIN, "return CODE_BYTES + path.stat().st_size",
      "return path.stat().st_size", "test_over_the_size_limit"),
    M("the fit takes the coarser half", TRAIN, "if bytes_at(middle) <= room else",
      "if bytes_at(middle) > room else", "test_the_fit_lands_under_every_limit"),
    M("the fit keeps wide steps at INT6", TRAIN, "return 5 if free and wide else bits,",
      "return bits,", "test_fixed_bits_are_honoured"),
    # artifact
    M("the digest is not compared", TRAIN, "(body, *raw.values()))).digest() == digest,",
      "(body, *raw.values()))).digest(),", "test_a_flipped_byte_is_damage"),
    M("the CRC of a stream is not compared", TRAIN, "require(zlib.crc32(packed) == crc and 0 <",
      "require(0 <", "test_a_tampered_header_is_refused"),
    M("a file is renamed before it is on the disk", TRAIN, "os.fsync(stream.fileno())", "pass",
      "test_writing_is_renamed_when_whole"),
    M("rANS: lanes spill at another bound", TRAIN, "frequency[place] << (32 - RANS_BITS)",
      "frequency[place] << (31 - RANS_BITS)", "test_rans_is_exact"),
    M("rANS: what follows its end is ignored", TRAIN,
      "if done != len(words) or (state != RANS_LEAST).any():", "if (state != RANS_LEAST).any():",
      "test_rans_refuses_what_it_cannot_have_made"),
    M("an artifact fits any vocabulary of its size", TRAIN, "require(made_for == ours,",
      "require(made_for[0] == ours[0],", "test_artifacts_of_another_vocabulary_are_refused"),
    M("repeats that never ran are stored", TRAIN, "if not model.recur:", "if False:",
      "test_a_run_that_ends_before_recurrence_stores_no_repeats"),
    M("a checkpoint may hold pickles", TRAIN, "np.load(io.BytesIO(data), allow_pickle=False)",
      "np.load(io.BytesIO(data), allow_pickle=True)", "test_loading_executes_nothing"),
    # evaluation
    M("a window's context is scored again", TRAIN,
      "nats[start + first : start + self.length] = row[first:]",
      "nats[start : start + self.length] = row", "test_scores_belong_to_their_tokens"),
    M("BPB in nats", TRAIN, "return self.nats / math.log(2) / (self.bytes",
      "return self.nats / (self.bytes", "test_score_arithmetic"),
    M("dumped ids are one place off", TRAIN, "ids=self.val.ids[1:], nats",
      "ids=self.val.ids[:-1], nats", "test_dumped_scores_recompute_the_result"),
    M("the headline is the best score", TRAIN,
      "max(scores.keys() & set(EVAL_MODES), key=EVAL_MODES.index)",
      "min(scores.keys() & set(EVAL_MODES), key=lambda mode: scores[mode].bpb)",
      "test_the_headline_follows_from_the_settings"),
    M("SLOT is a mode like others", TRAIN, 'label = name if mode == "slot" else mode',
      "label = mode", "test_slot_is_labelled_everywhere"),
    M("SLOT fits all of its window", TRAIN, "h + shift.to(h.dtype))[:, -c.eval_stride :]",
      "h + shift.to(h.dtype))", "test_slot_fits_the_last_stride_of_its_batch"),
    # n-gram cache
    M("n-grams cross documents", TRAIN, "np.where(reach >= k - 1, number + 1, 0)",
      "np.where(places >= k - 1, number + 1, 0)", "test_ngram_is_witten_bell"),
    M("the cache counts a chunk before it is scored", TRAIN,
      "cached = np.exp(-nats[part].astype(float)), cache.probabilities(part)",
      "cached = np.exp(-nats[part].astype(float)), cache.update(part) or cache.probabilities(part)",
      "test_every_mode_is_legal[ngram_sliding-sliding]"),
    # test-time training
    M("a chunk is trained on before all of it is scored", TRAIN,
      "np.searchsorted(windows.sum(1), edges)",
      "np.searchsorted(windows[:, 0] + self.length, edges)",
      "test_every_mode_is_legal[ttt-sliding]"),
    M("the next chunk is trained on", TRAIN, "(begin, end) = self.config, len(edges) - 2, "
      "edges[number : number + 2]", "(begin, end) = self.config, len(edges) - 2, (edges[number], "
      "edges[min(number + 2, len(edges) - 1)])",
      "test_every_mode_is_legal[ttt-sliding]"),
    M("TTT has no momentum", TRAIN, "torch.optim.SGD(self.params, c.ttt_lr, c.ttt_momentum)",
      "torch.optim.SGD(self.params, c.ttt_lr)", "test_every_setting_does_something"),
    M("TTT's cosine does not come to its end", TRAIN, "number / max(last, 1)",
      "number / (last + 1)", "test_training_is_the_formula"),
    M("TTT's gradients stay on their rank", TRAIN,
      "self.runtime.all_reduce_packed([p.grad for p in self.params])", "pass",
      "test_training_is_the_formula"),
    M("TTT trains on targets twice", TRAIN, "(places >= first[:, None])",
      "(places >= 0 * first[:, None])", "test_training_is_the_formula"),
    M("TTT leaves its weights to the next mode", TRAIN,
      "torch._foreach_copy_(self.params, saved)\n        return scored",
      "pass\n        return scored", "test_frozen_is_frozen"),
    # adapters on documents: what would make a score illegal
    M("a chunk of a document is trained on before it is scored", TRAIN,
      "        nats = self.score_chunk(tokens(start + np.arange(size), 0), tokens(target, 1),\n"
      "                                send(target - start), *self.pair)\n",
      "        given = (tokens(start + np.arange(size), 0), tokens(target, 1),\n"
      "                 send(target - start), *self.pair)\n"
      "        self.learn_chunk(self.score_chunk(*given).sum(), send(np.float32(0.01 * more)),\n"
      "                         send(np.float32(more + 1)))\n"
      "        nats = self.score_chunk(*given)\n", "test_every_mode_is_legal[documents-sliding]"),
    M("B goes on into the next document", TRAIN, "(self.pair[1], *self.moments)", "self.moments",
      ("test_nothing_passes_between_documents", "test_every_mode_is_legal[documents-sliding]")),
    M("A goes on into the next document", TRAIN, "self.first_a.where(new.view(-1, 1, 1, 1), ",
      "self.first_a.where((self.pair[0] == 0).all(), ", "test_nothing_passes_between_documents"),
    M("AdamW's moments go on into the next document", TRAIN, "(self.pair[1], *self.moments)",
      "(self.pair[1],)", "test_nothing_passes_between_documents"),
    M("a document is trained into the model before it is scored", TRAIN,
      "            if learn:\n                self.learn_documents(",
      "            if split and not learn:\n                self.learn_documents(",
      "test_every_mode_is_legal[documents_global-sliding]"),
    M("the global phase trains on the document after it", TRAIN,
      "self.learn_documents(int(self.documents[split, 0]))",
      "self.learn_documents(int(self.documents[split, 0] + self.documents[split, 1]))",
      "test_every_mode_is_legal[documents_global-sliding]"),
    M("the global phase trains on what fills a window", TRAIN, "& (places < stop[:, None])",
      "& (places < stop[:, None] + length)", "test_it_is_its_definition"),
    M("padding is attended to", TRAIN, "at = np.minimum(begin + places, len(ids) - 2) + ahead\n"
      "            return send(np.where(places < end, ids[at], self.padding).astype(np.int64))",
      "at = np.minimum(begin + places, len(ids) - 2) + ahead\n"
      "            new = np.where(places < end, ids[at], self.padding).astype(np.int64)\n"
      "            return send(new if ahead else np.roll(new, 1, 1))",
      "test_padding_reaches_no_score"),
    M("a chunk's padding is scored", TRAIN, "scored, more = target < end, end < length",
      "scored, more = target < end + 1, end < length", "test_it_is_its_definition"),
    M("documents are grouped by their tokens", TRAIN,
      'order = np.argsort(-documents[:, 1], kind="stable")',
      "order = np.argsort(self.evaluator.val.ids[documents[:, 0] + 1], kind='stable')",
      "test_batches_know_lengths_only"),
    M("the last chunk of a document is trained on", TRAIN, "end < length\n        if (number",
      "end <= length\n        if (number", "test_every_mode_is_legal[documents-sliding]"),
    M("a document's window reads what is after the chunk", TRAIN,
      "np.where(places < end, ids[at], self.padding)",
      "np.where(places < length, ids[at], self.padding)",
      "test_every_mode_is_legal[documents-sliding]"),
    M("a document's window ends with the document", TRAIN, "(number + 1) * chunk - size, 0)",
      "end - size, 0)", "test_where_a_document_ends_tells_its_scores_nothing"),
    M("the work of the global phase is a number of NumPy's", TRAIN,
      "int(self.documents[: c.ttt_global_docs, 1].sum())",
      "self.documents[: c.ttt_global_docs, 1].sum()", "test_progress_of_a_slow_evaluation"),
    M("adapters of all documents are one", TRAIN, "(x @ adapter[0].mT @ adapter[1].mT)",
      "(x @ adapter[0].mean(0).mT @ adapter[1].mean(0).mT)",
      ("test_every_adapter_counts", "test_nothing_passes_between_documents")),
    # and what would make it another mode
    M("the MLP has no adapter", TRAIN, "return adapted(y, x, adapters[3])", "return y",
      ("test_every_adapter_counts", "test_adapters_are_in_the_matrices")),
    M("v has q's adapter", TRAIN, "adapted(v, x, adapters[1])", "adapted(v, x, adapters[0])",
      "test_adapters_are_in_the_matrices"),
    M("passes of a layer share their adapters", TRAIN, "adapters[4 * i : 4 * i + 4]",
      "adapters[4 * run.layer : 4 * run.layer + 4]",
      ("test_every_adapter_counts", "test_adapters_are_in_the_matrices")),
    M("adapters are not scaled", TRAIN, "(self.config.ttt_lora_alpha / b.size(2))", "1.0",
      "test_adapters_are_in_the_matrices"),
    M("decay of adapters is not scaled by the rate", TRAIN, "+ 1e-10) + decay * p))",
      "+ 1e-10)) + 0.01 * decay * p)", "test_it_is_its_definition"),
    M("AdamW of adapters has no correction", TRAIN, "(v / correction).sqrt()", "v.sqrt()",
      "test_it_is_its_definition"),
    M("the model is left as the global phase made it", TRAIN,
      "self.model.train_only(self.is_trained)\n        with torch.no_grad():\n"
      "            torch._foreach_copy_(self.params, saved)",
      "self.model.train_only(self.is_trained)", "test_it_is_its_definition"),
    M("the global phase's rate does not fall", TRAIN, "self.step(batch, end, i / len(batches))",
      "self.step(batch, end, 0.0)", "test_it_is_its_definition"),
    M("ranks share no documents", TRAIN, "[self.runtime.rank :: self.runtime.world]", "[:]",
      "test_ranks_do_not_matter"),
    M("a free slot waits for all others", TRAIN, "if not ends or max(ends) >= sizes[-1]:",
      "if not ends:", "test_plan_of_documents"),
    M("memory is not asked for the batch", TRAIN, "c.ttt_doc_batch or max(1, room)",
      "c.ttt_doc_batch or 64", "test_slots_follow_from_memory"),
    M("adapters take no memory", TRAIN, "(self.sizes[-1] + 20 * values // BYTES_PER_TOKEN)",
      "self.sizes[-1]", "test_slots_follow_from_memory"),
    M("a window's size is not primed", TRAIN, "for n in self.sizes if self.scores]",
      "for n in self.sizes[1:] if self.scores]",
      "test_documents_are_primed_on_other_tokens"),
    # checkpoints, signals
    M("a signal does not end the run", TRAIN, "torch.tensor([late, bool(runtime.signal),",
      "torch.tensor([late, False,", "test_a_signal_checkpoints_and_resume_goes_on"),
    M("a damaged checkpoint is loaded", TRAIN, "require(zlib.crc32(data) == crc, f",
      "require(True, f", "test_the_one_before_a_damaged_checkpoint"),
    M("a checkpoint of other settings is loaded", TRAIN, "require(not differ, f", "require(True, f",
      "test_foreign_checkpoints_are_refused_by_name"),
    M("a step that diverged is kept", TRAIN, "self.read_facts(self.steps)  #", "#",
      "test_non_finite_keeps_the_last_checkpoint"),
    M("recurrence starts again on resume", TRAIN, 'self.phase = Phase(*state["phase"])', "pass",
      "test_a_signal_checkpoints_and_resume_goes_on"),
    M("the EMA starts anew on resume", TRAIN, "weight=self.params, ema=average.ema,",
      "weight=self.params,", "test_a_signal_checkpoints_and_resume_goes_on"),
    M("a resumed run begins with no facts of its clock", TRAIN, 'Facts(*state["facts"]), state[',
      "Facts(), state[", "test_a_resumed_run_goes_by_the_clock_of_the_whole_run"),
    M("each rank judges its own shard", TRAIN, "problem = max(runtime.gather(problem))",
      "problem = (runtime.gather(problem), problem)[1]",
      "test_a_shard_damaged_on_one_rank_is_damage_for_all"),
    # segmenter
    M("no point for a homogeneous token", TOOL, "len(token) + bool(flags & HOMOGENEOUS) +",
      "len(token) +", "test_segmenter_agrees_with_the_page_on_random_vocabularies"),
    M("no penalty for a broken word", TOOL, "value -= 103 * (table[candidate, FLAGS]",
      "value -= 0 * (table[candidate, FLAGS]",
      "test_segmenter_agrees_with_the_page_on_random_vocabularies"),
    M("a pair as long as the token is a little worse", TOOL, "100 if pair < size else 10000", "100",
      "test_segmenter_agrees_with_the_page_on_random_vocabularies"),
    M("of equal pairs the last is chosen", TOOL, "if value > best:", "if value >= best:",
      "test_segmenter_agrees_with_the_page_on_random_vocabularies"),
    M("a word that a letter follows is not broken", TOOL, "scores[:, LETTER_CLASS] -= 3 *",
      "scores[:, LETTER_CLASS] -= 0 *",
      "test_segmenter_agrees_with_the_page_on_random_vocabularies"),
    M("one whole word is cut before a space", TOOL,
      "and not (word and classes[text[after]] == SPACE_CLASS)", "and True",
      "test_segmenter_agrees_with_the_page_on_random_vocabularies"),
    M("the longest token forgets its fall-back", TOOL,
      "longest[n] = keys.get(state, longest[back])", "longest[n] = keys.get(state, 0)",
      "test_segmenter_agrees_with_the_page_on_random_vocabularies"),
    M("priorities 7 and 8 are swapped", TOOL, "return 7 if left in WHITE_SPACE else 8",
      "return 8 if left in WHITE_SPACE else 7", "test_fields_of_the_page"),
    M("of equal alternatives the shorter is the first", TOOL, "reverse=True)[:2]]",
      "reverse=True)[1::-1]]", "test_alternatives_that_are_cut_alike"),
    M("of equal alternatives the shorter is kept", TOOL,
      "(cut_priority(token, cut), cut)", "(cut_priority(token, cut), -cut)",
      "test_alternatives_that_are_cut_alike"),
    M("half of the tokens make a class", TOOL, "2 * most > counts.sum(axis=1)",
      "2 * most >= counts.sum(axis=1)", "test_fields_of_the_page"),
    # vocabularies and SentencePiece's table
    M("a vocabulary may lack bytes", TOOL, "    if missing:", "    if False:",
      "test_lossy_yaml_is_refused_with_its_reasons"),
    M("a vocabulary may normalise its text", TOOL, ', "normalization": "none"}', "}",
      "test_lossy_yaml_is_refused_with_its_reasons"),
    M("bytes that are not UTF-8 are text", TOOL, "if is_utf8(text.values) and not", "if not",
      "test_invalid_utf8_documents_take_the_slow_way"),
    M("a character may begin in one document and end in the next", TOOL,
      " and not (first & 0xC0 == 0x80).any()", "", "test_a_character_cut_by_documents_is_none"),
    M("a character may go on after a control piece", TOOL, "control * (k != self.bos_id)", 'b""',
      "test_table_equals_sp_decode_on_random_ids"),
    # capitals as marks
    M("capitals within a word take one mark", TOOL, """stop > i + 1 and not (
                        stop < end and np.uint8(text[stop] - ord("a")) < 26)""",
      "stop > i + 1", "test_examples"),
    M("a single capital takes the mark of several", TOOL, "whole = stop > i + 1 and not (",
      "whole = not (", "test_examples"),
    M("a row of capitals goes on in the next document", TOOL,
      'while stop < end and np.uint8(text[stop] - ord("A"))',
      'while stop < text.size and np.uint8(text[stop] - ord("A"))',
      "test_every_short_text_and_every_pair_of_letters"),
    M("a run of letters goes on in the next document", TOOL,
      'stop < end and np.uint8(text[stop] - ord("a"))',
      'stop < text.size and np.uint8(text[stop] - ord("a"))',
      "test_every_short_text_and_every_pair_of_letters"),
    M("a mark is before the space of the document before", TOOL,
      "if i > begin and text[i - 1]", "if i > 0 and text[i - 1]",
      "test_every_short_text_and_every_pair_of_letters"),
    M("a mark stands after the space", TOOL, "if i > begin and text[i - 1] == SPACE:", "if False:",
      "test_examples"),
    M("every capital is marked", TOOL, "if first or not whole:", "if True:", "test_examples"),
    M("text may hold a mark", TOOL, "elif value >= RUN_MARK:", "elif value > RUN_MARK:",
      "test_text_with_a_mark_is_refused_by_name"),
    M("capitals go on after a run of letters", TOOL, "elif inside or value != SPACE:",
      "elif value != SPACE:", "test_examples"),
    M("a mark waits for a letter", TOOL, "elif inside or value != SPACE:", "elif inside:",
      "test_whatever_is_restored_has_the_bytes_without_its_marks"),
    M("a mark is good for the next document", TOOL, """at = 0
    for document in range(starts.size - 1):
        mark, inside = 0, False  #""", """at, mark, inside = 0, 0, False
    for document in range(starts.size - 1):
        pass  #""",
      "test_every_short_text_and_every_pair_of_letters"),
    M("marks are bytes", TOOL, "MARKS * marked", 'b""',
      "test_what_a_vocabulary_with_case_must_hold"),
    M("marks are no bytes in any vocabulary", TOOL, "MARKS * marked", "MARKS",
      "test_what_a_vocabulary_with_case_must_hold"),
    M("a vocabulary may have any case", TOOL, 'require(case in ("none", "ascii"),', "require(True,",
      "test_what_a_vocabulary_with_case_must_hold"),
    M("any vocabulary may lack capitals", TOOL, 'CAPITALS if case == "ascii" else b""', "CAPITALS",
      "test_what_a_vocabulary_with_case_must_hold"),
    M("shards are not restored to be compared", TOOL,
      "return restore_capitals(text) if self.marked else text", "return text",
      "test_shards_of_a_vocabulary_with_case"),
    M("marks that are to be apart are merged", BUILDER, 'MARKS if apart else b""', 'b""',
      "test_built_vocabularies_with_case"),
    M("the builder counts marks as bytes", BUILDER, "{draft.source_bytes} bytes, ",
      "{draft.text.values.size} bytes, ",
      "test_a_draft_counts_the_bytes_of_the_source"),
    M("a built vocabulary does not say its case", BUILDER, 'case != "none"', "False",
      "test_built_vocabularies_with_case"),
    M("the frontier's vocabulary has no case", "run_8xh100.sh", "--case ascii", "--case none",
      "test_script_builds_the_frontiers_vocabulary"),
    # shards and the ledger
    M("documents that decode differently are written", TOOL,
      "wrong = block.sizes[2]", "wrong = 0 * block.sizes[2]",
      "test_wrong_segmentation_is_never_published"),
    M("documents that are counted wrong are written", TOOL,
      "wrong = wrong | (counted != block.sizes[0])", "pass",
      "test_wrong_byte_counts_are_never_published"),
    M("a document ends with its shard", TOOL, "*_continuation(paths, index, bos)]", "]",
      "test_shards_with_documents_across_borders"),
    M("a missing shard is passed over", TOOL,
      "require(follows(before, path) is not False,", "require(True,",
      "test_bad_shards_are_refused_by_name_"),
    M("BOS is no boundary", TOOL,
      "np.arange(tokenizer.vocab_size) == tokenizer.bos_id", "np.arange(tokenizer.vocab_size) < 0",
      "test_shards_with_documents_across_borders"),
    M("a finished shard is not read again", TOOL,
      'file_sha256(self.path / name) == entry["sha256"]', "True",
      "test_restart_skips_what_is_finished_and_redoes_the_rest"),
    M("a shard that is made again stays in the manifest", TOOL,
      "        self.forget(name)\n        counts", "        counts",
      "test_manifest_is_right_when_a_redo_is_killed"),
    M("a shard is renamed before it is on the disk", TOOL, "os.fsync(handle)", "pass",
      "test_killed_at_any_point_ends_byte_identical"),
    M("a lossy tokenizer is called exact", TOOL, '"byte_exact": tokenizer.status == "exact"',
      '"byte_exact": True', "test_allow_lossy_states_what_is_wrong"),
    M("shards that were made otherwise are replaced", TOOL, "require(not told or overwrite,",
      "require(True,", "test_what_was_made_otherwise_is_kept_unless_told"),
    M("a manifest lists shards of two vocabularies", TOOL,
      'require(entry["identity"]["tokenizer_sha256"] == tokenizer.sha256,', "require(True,",
      "test_manifest_sees_entries_that_come_while_it_is_written"),
    M("workers do not end when another has died", TOOL, "on_signals(signal.SIG_DFL)",
      "on_signals(signal.SIG_IGN)", "test_an_idle_worker_that_dies_is_reported"),
    M("skipped shards count as progress", TOOL, "Progress(sum(left.values()), len(finished))",
      "Progress(sum(open_shard(p).size for p in self.paths), 0)",
      "test_progress_is_of_the_shards_that_are_left"),
    M("the manifest forgets what another rank has finished meanwhile", TOOL,
      "while entries != (now := self.entries()):", "if entries != (now := self.entries()):",
      "test_manifest_sees_entries_that_come_while_it_is_written"),
    M("partial files of dead runs stay", TOOL,
      "                path.unlink()\n", "                pass\n",
      "test_stop_leaves_no_partial_output[9]"),
    M("workers go on when the run is stopped", TOOL, "if Worker.given_up.is_set():", "if False:",
      "test_stop_leaves_no_partial_output[15]"),
    M("any tokenizer in the folder is the shards'", TRAIN, "if kind is None or", "if True or",
      "test_the_manifest_says_which_tokenizer_the_shards_have"),
    # rules of a record
    M("rule evaluation clock: no cap", RULES, "(run.eval_seconds or 0) > CAP_EVAL_SECONDS", "False",
      "test_rules_bind_everybody"),
    M("rule seeds: two are enough", RULES, "len(logged) < RECORD_SEEDS", "len(logged) < 2",
      "test_verify_names_each_fault[seeds]"),
    M("rule seeds: the same losses twice", RULES, "if twin.seed != run.seed:", "if False:",
      "test_verify_names_each_fault[seeds]"),
    M("rule scores: any mean", RULES, "not same(claimed, statistics.fmean(values))", "False",
      "test_verify_names_each_fault[scores]"),
    M("rule clock: a second late is a note", RULES, "LATE_MS = 200", "LATE_MS = 1000",
      "test_rules_bind_everybody"),
    M("rule compliance: SLOT's score", RULES,
      "if any(same(c, bad) for c in claimed for bad in tainted):", "if False:",
      "test_verify_names_each_fault[compliance]"),
    M("rule ledger: bytes that are not proven", RULES, 'if run.audit != "exact":',
      "if not run.audit:", "test_verify_names_each_fault[ledger]"),
    M("rule vocabulary: none at all", RULES, "if digest is None or digest !=", "if digest !=",
      "test_verify_names_each_fault[vocabulary]"),
    M("rule generated: the readable source may be another", "records/generated.py",
      'return "" if found == data else (', 'return "" if found else (',
      "test_a_packed_folder_holds_its_source"),
    M("rule denominator: 5 % are nothing", "records/denominator.py", "SAME = 1e-3", "SAME = 0.09",
      "test_miscounted_bytes_are_flagged"),
    # other record tools
    M("curves keep their miscounted bytes", "records/denominator.py",
      "val=[point._replace(bpb=factor * point.bpb) for point in run.val]", "val=run.val",
      "test_miscounted_runs_are_corrected_however_they_are_named"),
    M("a proven count of another text is corrected", "records/denominator.py",
      "or proven and difference > SAME:", "or False:", "test_miscounted_bytes_are_flagged"),
    M("TTT is credited where a setting allows it", "records/generated.py",
      '"stage" not in row or', '"stage" in row or', "test_attribution_is_of_what_ran"),
    M("Welch: equal spreads are no spread", "records/welch.py", "(first.std or second.std)",
      "(first.std - second.std)", "test_welch_by_hand"),
    M("Welch: the spread of one side is none", "records/welch.py", "(first.std or second.std)",
      "(first.std and second.std)", "test_welch_by_hand"),
    # experiments
    M("a difference is not that of one seed", "records/ablate.py",
      "ours[score] - theirs[score] for ours, theirs in zip(\n        results[name], results",
      "ours[score] - theirs[score] for ours, theirs in zip(\n        results[name][::-1], results",
      "test_power_of_a_plan"),
    M("what could be seen is what half an interval is", "records/design.py", "in (0.05, 0.025))",
      "in (0.025,))", "test_what_power_promises"),
    M("a run out of turn counts", "records/ablate.py", "itertools.takewhile(bool, runs)",
      "filter(None, runs)", "test_ablation_slots_and_list"),
    M("both ends are drawn alike", "records/design.py", "np.random.default_rng(number)",
      "np.random.default_rng(0)", (), "each end is balanced and fitted by itself"),
    M("levers leave an end together", "records/design.py", "random.permutation(runs)",
      "range(runs)", "test_every_lever_leaves_its_end_in_as_many_runs"),
    M("seeds are not taken out", "records/design.py",
      "*(seed_of == seed for seed in sorted({*seed_of.tolist()}))", "seed_of > 0",
      "test_effects_without_chance_are_exact"),
    M("the fit's freedom without its effects", "records/design.py",
      "len(names) - matrix.shape[1] if full", "len(names) - 1 if full",
      "test_intervals_of_effects_hold_the_truth_as_often_as_they_say"),
    M("errors of two ends do not shrink in their mean", "records/design.py",
      "math.sqrt(sum(squares)) / len(at)", "math.sqrt(sum(squares) / len(at))",
      "test_effects_over_both_ends"),
    M("the mean of two ends has all their freedom", "records/design.py",
      "n = 1 + sum(squares) ** 2 / sum(v**2 / (effect.n - 1)",
      "n = 99 + sum(squares) ** 2 / sum(v**2 / (effect.n - 1)", "test_effects_over_both_ends"),
    M("all runs measure an effect", "records/design.py", "math.ceil(runs - freedom + more)",
      "math.ceil(more * runs / freedom)", "test_runs_for_the_goal"),
    M("of many pairs one stands out by chance", "records/design.py", "0.025 / max(1, len(found))",
      "0.025", "test_of_many_pairs_that_add_up_one_stands_out_in_one_of_twenty_plans"),
    M("a pair is taken for its first lever", "records/design.py",
      "dict(zip(pair, others, strict=True))", "{pair[0]: others[0]}",
      "test_a_pair_that_does_not_add_up"),
    M("a pair is measured with what its levers are worth", "records/design.py",
      "both -= basis @ (basis.T @ both)", "pass", "test_a_pair_that_does_not_add_up"),
    M("the noise of documents is that of tokens", "records/studies/noise.py",
      "rest / size.sum() ** 2", "rest / len(size) ** 2", "test_study_of_the_noise"),
    M("short documents take as long to score as whole ones", "records/studies/noise.py",
      'run["seconds_eval"] * part', 'run["seconds_eval"]', "test_study_of_the_noise"),
    M("differences count as two that differ", "records/studies/noise.py",
      '", 0.5', '", 1.0', "test_study_of_the_noise_of_differences"),
    M("a token is repeated after one token", "records/studies/noise.py", "np.roll(ids, 2), ", "",
      "test_study_of_the_noise_of_repeated_tokens"),
    M("a token is repeated in another document", "records/studies/noise.py",
      "np.cumsum(sizes == 0)", "0 * ids", "test_study_of_the_noise_of_repeated_tokens"),
    M("what rounding costs is the whole score", "records/design.py",
      'results[name][0][before] if before else 0', "0",
      "test_effects_without_chance_are_exact"),
    M("the frontier's end has the record's levels", "records/design.py",
      'plan.get("at", {}).get(end, {}).get(lever, names[0])', "names[0]",
      "test_every_lever_leaves_its_end_in_as_many_runs"),
)


# ------------------------------------------------------------------------------------- running


@functools.cache
def file_of(test: str) -> str:
    """The test file that defines a test."""
    found = [path for path in (ROOT / "test_cpu.py", *ROOT.glob("tests/test_*.py"),
                               *ROOT.glob("records/tests/test_*.py"))
             if f"\ndef {test}(" in path.read_text(encoding="utf-8")]
    if len(found) != 1:
        raise LookupError(f"{len(found)} tests have the name {test}")
    return str(found[0].relative_to(ROOT))


def nodes(mutant: Mutant) -> list[str]:
    """The tests of a mutant as pytest names them."""
    names = [mutant.tests] if isinstance(mutant.tests, str) else mutant.tests
    return [f"{file_of(name.partition('[')[0])}::{name}" for name in names]


def key_of(about: Mutant | str, *files: str) -> str:
    """SHA-256 of a mutant or test, of some files and of what all tests share."""
    texts = [(ROOT / name.partition("::")[0]).read_bytes() for name in (*files, *ALL_USE)]
    return hashlib.sha256(repr((about, texts)).encode()).hexdigest()


def copy_repository(folder: Path) -> Path:
    """A copy of the files that git knows or would take in, with ../shared beside it."""
    names = subprocess.run(["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT,
                           capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "repo" / name)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to((ROOT.parent / "shared").resolve())
    return folder / "repo"


def start_worker(folders: Any) -> None:
    """Take one of the copies, and load once what all tests load."""
    global FOLDER
    FOLDER = folders.get()
    os.environ |= dict(OMP_NUM_THREADS="1", COLUMNS="250", CUDA_VISIBLE_DEVICES="")
    for name in ("pytest", "numpy", "torch._dynamo", "numba", "sentencepiece"):
        with contextlib.suppress(ImportError):
            __import__(name)


def be_pytest(output: Any, arguments: list[str]) -> None:
    """End this process as pytest, in the copy."""
    code = 3
    try:
        import pytest

        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        os.chdir(FOLDER)
        sys.path[0] = str(FOLDER)  # as for python -m pytest
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        code = int(pytest.main(["-q", "-p", "no:cacheprovider", *arguments]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def run_tests(*arguments: str) -> tuple[int, str]:
    """pytest's exit code (-1: it took too long) and output, in a fork of this process."""
    with tempfile.TemporaryFile("w+") as output:
        process, end = os.fork(), time.monotonic() + TIMEOUT
        if not process:
            be_pytest(output, ["-m", "", *arguments])  # slow ones too
        try:
            while (done := os.waitpid(process, os.WNOHANG))[0] == 0 and time.monotonic() < end:
                time.sleep(0.05)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        output.seek(0)
        return os.waitstatus_to_exitcode(done[1]) if done[0] else -1, output.read()


def try_tests(tests: list[str]) -> dict[str, str]:
    """What each of some tests does without a mutant: passed, skipped or failed."""
    code, output = run_tests("-rA", "--tb=no", *tests)
    lines = re.findall(r"(?m)^(PASSED|FAILED|ERROR) (.*)$", output)
    states = {}
    for test in tests:
        ends = {end for end, name in lines if re.match(re.escape(test) + r"(?:$| - |\[)", name)}
        states[test] = "failed" if code not in (0, 1) or ends - {"PASSED"} else (
            "passed" if ends else "skipped")
    return states


def try_mutant(mutant: Mutant) -> tuple[str, str]:
    """What the tests of a mutant do with it, and their first failure."""
    path = FOLDER / mutant.file
    text, stamp = path.read_text(encoding="utf-8"), path.stat().st_mtime_ns
    mutated = text.replace(mutant.old, mutant.new)
    path.write_text(mutated, encoding="utf-8")
    os.utime(path, (0, zlib.crc32(mutated.encode())))  # Python's and Numba's caches go by it
    code, output = run_tests("-x", "--tb=line", *nodes(mutant))
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(stamp, stamp))
    failed = re.findall(r"(?m)^(?:FAILED|ERROR) .*? - (.*)$", output)
    return ({0: "SURVIVED", 1: "killed"}.get(code, f"BROKEN, exit code {code}"),
            (failed or output.strip().splitlines() or [""])[-1])


def outcome(mutant: Mutant, kept: dict[str, Any]) -> tuple[str, str]:
    """State of a mutant by what is known, and a note; "open" if it is to be tried."""
    count = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
    if count != 1:
        return "NO LONGER APPLIES", f"{mutant.file} has it {count} times"
    if not mutant.tests:
        return "no effect", mutant.why
    try:
        tests = nodes(mutant)
    except LookupError as error:
        return "NO LONGER APPLIES", str(error)
    if known := kept.get(key_of(mutant, mutant.file, *tests)):
        return known
    states = {kept.get(key_of(test, TRAIN, TOOL, RULES, test)) for test in tests}
    return ("FAILS WITHOUT IT" if "failed" in states else "skipped" if "skipped" in states
            else "open"), ", ".join(tests)


def run(mutants: list[Mutant], jobs: int, cache: Path) -> int:
    """Try what is not known yet, keep what is sure, sum up; returns how many are not well."""
    kept: dict[str, Any] = json.loads(cache.read_text()) if cache.exists() else {}

    def keep(news: dict[str, Any]) -> None:
        kept.update(news)
        sure = {k: v for k, v in kept.items() if v == "passed" or v[0] in ("killed", "SURVIVED")}
        cache.parent.mkdir(exist_ok=True)
        cache.with_suffix(".tmp").write_text(json.dumps(sure, indent=0))
        cache.with_suffix(".tmp").replace(cache)

    def unknown() -> list[Mutant]:
        return [mutant for mutant in mutants if outcome(mutant, kept)[0] == "open"]

    fork, files = multiprocessing.get_context("fork"), defaultdict(list)
    for test in {test for mutant in unknown() for test in nodes(mutant)}:
        if key_of(test, TRAIN, TOOL, RULES, test) not in kept:
            files[test.partition("::")[0]].append(test)
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        folders = fork.SimpleQueue()
        for number in range(jobs):
            folders.put(copy_repository(Path(scratch, str(number))))
        with fork.Pool(jobs, start_worker, (folders,)) as pool:
            for states in pool.imap_unordered(try_tests, files.values()):  # without a mutant
                keep({key_of(test, TRAIN, TOOL, RULES, test): s for test, s in states.items()})
            tried = unknown()
            for mutant, result in zip(tried, pool.imap(try_mutant, tried), strict=True):
                keep({key_of(mutant, mutant.file, *nodes(mutant)): result})
                print(f"{result[0]}: {mutant.name}  [{result[1]}]", flush=True)
    ends = [(*outcome(mutant, kept), mutant.name) for mutant in mutants]
    for state, note, name in ends:
        if state != "killed":
            print(f"{state}: {name}  [{note}]")
    print(len(ends), "mutants:", dict(Counter(state for state, _, _ in ends)))
    return sum(state not in ("killed", "no effect", "skipped") for state, _, _ in ends)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run the mutants of tests/mutants.py.")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="mutants whose names have one")
    parser.add_argument("--list", action="store_true", help="print them and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="tests at once (1)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # workers and copies go as well
    chosen = [m for m in MUTANTS if any(word in m.name for word in options.only or [""])]
    if options.list:
        print(*(f"{m.name}  [{m.file}: {m.tests or m.why}]" for m in chosen), sep="\n")
        return 0
    return int(run(chosen, options.jobs, ROOT / ".cache" / "mutants.json") > 0)


if __name__ == "__main__":
    sys.exit(main())
