# ruff: noqa: E501 - one line of the table, one line of output
"""Typical mistakes and the one line each gets."""

from __future__ import annotations

import pytest

# (what the mistake is, text in the sound recipe, what stands there instead, the one line printed)
MISTAKES = [
    ("section", "trainer:", "trainr:", "r.yaml:35: unknown section 'trainr' - did you mean 'trainer'?"),
    ("far section", "seed: 42", "quux: 1", "r.yaml:3: unknown section 'quux' - known: name, seed, run_root"),
    ("load folder", "seed: 42", "load: runs/Llama-3-8b/tp-pp",
     "r.yaml:3: unknown section 'load' - fit resumes from where it saves, run_root/name: write resume: auto, never or required"),
    ("ckpt_path", "seed: 42", "ckpt_path: x.ckpt", "r.yaml:3: unknown section 'ckpt_path' - fit resumes from where it saves"),
    ("seed_everything", "seed: 42", "seed_everything: 1", "r.yaml:3: unknown section 'seed_everything' - write seed"),
    ("seed type", "seed: 42", "seed: many", "r.yaml:3: seed: expected an integer, not 'many'"),
    ("seed bool", "seed: 42", "seed: true", "r.yaml:3: seed: expected an integer, not true"),
    ("resume", "resume: auto", "resume: allways",
     "r.yaml:5: resume: expected one of 'auto', 'never', 'required', not 'allways'"),
    ("name", "name: moe", "name: [moe]", "r.yaml:2: name: expected text, not a list"),
    ("class", "modules.PretrainModule", "modules.PretrainModul",
     "r.yaml:7: model: there is no class 'llmrecipes.modules.PretrainModul' - did you mean 'llmrecipes.modules.PretrainModule'?"),
    ("module", "optim.AdamW", "optin.AdamW",
     "r.yaml:20: model.init_args.optimizer: there is no class 'llmrecipes.optin.AdamW' - did you mean 'llmrecipes.optim.AdamW'?"),
    ("other kind", "optim.AdamW", "optim.WarmupCosine",
     "r.yaml:20: model.init_args.optimizer: llmrecipes.optim.WarmupCosine is no AdamW"),
    ("init_arg", "  init_args:\n    train", "  init_arg:\n    train",
     "r.yaml:30: unknown key 'data.init_arg': it goes beside class_path - did you mean 'init_args'?"),
    ("class_path", "class_path: llmrecipes.data.PackedShards", "class_pth: llmrecipes.data.PackedShards",
     "r.yaml:29: unknown key 'data.class_pth': it goes beside class_path - did you mean 'class_path'?"),
    ("argument", "seq_len:", "seq_lenn:",
     "r.yaml:32: unknown key 'data.init_args.seq_lenn': it is not an argument of PackedShards - did you mean 'seq_len'?"),
    ("missing argument", "    seq_len: 2048\n", "", "r.yaml:30: data.init_args.seq_len is missing: PackedShards needs it"),
    ("nested key", "top_k: 2", "topk: 2",
     "r.yaml:16: unknown key 'model.init_args.config.moe.topk': it is not an argument of MoEConfig - did you mean 'top_k'?"),
    ("nested type", "top_k: 2", "top_k: two", "r.yaml:16: model.init_args.config.moe.top_k: expected an integer, not 'two'"),
    ("missing size", "      dim: 128\n", "", "r.yaml:9: model.init_args.config.dim is missing: ModelConfig needs it"),
    ("literal", "dim: 128", "dim: 128\n      norm: rmss",
     "r.yaml:12: model.init_args.config.norm: expected one of 'rms', 'layer', not 'rmss' - did you mean 'rms'?"),
    ("float for int", "seq_len: 2048", "seq_len: 2e3", "r.yaml:32: data.init_args.seq_len: expected an integer, not 2000.0"),
    ("text for float", "lr: 1e-3", "lr: small", "r.yaml:21: model.init_args.optimizer.init_args.lr: expected a number, not 'small'"),
    ("tuple", "betas: [0.9, 0.95]", "betas: [0.9]",
     "r.yaml:21: model.init_args.optimizer.init_args.betas: expected a list of 2 values, not 1"),
    ("weight", "data/ja: 0.5", "data/ja: half", "r.yaml:31: data.init_args.train.data/ja: expected a number, not 'half'"),
    ("no unit", "warmup: 2000 steps", "warmup: 2000",
     "r.yaml:25: model.init_args.schedule.init_args.warmup: 2000 is not a length: write a number and its unit"),
    ("checkpoint unit", "every: 200 steps", "every: 200 iterations",
     "r.yaml:39: checkpoint.every: '200 iterations' is not a length"),
    ("trainer key", "max_steps: 62500", "max_step: 62500",
     "r.yaml:36: unknown key 'trainer.max_step': it is not an argument of Trainer - did you mean 'max_steps'?"),
    ("max_steps missing", "  max_steps: 62500\n", "", "r.yaml:35: trainer.max_steps is missing: a run needs its length"),
    ("max_steps -1", "max_steps: 62500", "max_steps: -1", "r.yaml:36: trainer.max_steps -1 is less than 1"),
    ("precision", "precision: bf16-mixed", "precision: bf-16",
     "r.yaml:37: trainer.precision: expected one of '64', '32', '16', 'transformer-engine', "),
    ("half precision", "bf16-mixed", "16-mixed",
     "r.yaml:37: trainer.precision 16-mixed needs a loss scaler, which the optimizer step here has not - use bf16-mixed"),
    ("accumulation", "precision: bf16-mixed", "accumulate_grad_batches: 4",
     "r.yaml:37: trainer.accumulate_grad_batches has no effect: one batch of the Trainer is one optimizer step - "
     "set data.init_args.global_batch and micro_batch"),
    ("clip", "precision: bf16-mixed", "gradient_clip_val: 1.0",
     "r.yaml:37: trainer.gradient_clip_val has no effect: the module clips - set model.init_args.clip_norm"),
    ("epochs", "precision: bf16-mixed", "max_epochs: 3",
     "r.yaml:37: trainer.max_epochs has no effect: a run is counted in optimizer steps - set trainer.max_steps"),
    ("Lightning's checkpoints", "precision: bf16-mixed", "enable_checkpointing: true",
     "r.yaml:37: trainer.enable_checkpointing would add Lightning's checkpoints"),
    ("validation", "precision: bf16-mixed", "val_check_interval: 0.5",
     "r.yaml:37: trainer.val_check_interval 0.5 is not a whole number of optimizer steps"),
    ("duplicate key", "seed: 42", "seed: 42\nseed: 43", "r.yaml:4: seed is given twice, first in line 3 - keep one of the two"),
    ("key that is no text", "seed: 42", "no: 1", "r.yaml:3: the key 'no' is not text but bool - write it in quotes"),
    ("unclosed", "betas: [0.9, 0.95]", "betas: [0.9, 0.95", "r.yaml:21: this is not YAML: "),
    ("tab", "  max_steps", "\tmax_steps", "r.yaml:36: this is not YAML: "),
    ("tag", "seed: 42", "seed: !env SEED", "r.yaml:3: seed: 'SEED' cannot be read as !env"),
    ("section as text", "logging: {every: 10}", "logging: often",
     "r.yaml:41: logging: expected a mapping of arguments, not 'often'"),
    ("heads", "num_heads: 4", "num_heads: 3", "r.yaml:13: model.init_args.config: num_heads 3 does not divide dim 128"),
    ("experts", "top_k: 2", "top_k: 9", "model.init_args.config: moe.top_k 9 is not between 1 and moe.num_experts 8"),
    ("top-1", "top_k: 2", "top_k: 1", "r.yaml:16: moe.top_k 1 with renormalize: the one weight is always 1"),
    ("zero size", "dim: 128", "dim: 0", "r.yaml:11: model.init_args.config: dim 0 is less than 1"),
    ("parameters", "7_509_120", "7_509_000",
     "r.yaml:18: the model has 7,509,120 parameters, not the expected 7,509,000 (120 more)"),
    ("batch", "global_batch: 1152", "global_batch: 1150",
     "r.yaml:34: data.init_args.global_batch 1150 is not divisible by micro_batch 8 x 1 data rank = 8 - use 1144 or 1152"),
    ("missing shard", "data/ja: 0.5", "data/jp: 0.5", "r.yaml:31: missing files data/jp.bin and data/jp.idx"),
    ("floor", "floor: 0.05", "floor: 5", "r.yaml:27: model.init_args.schedule: floor 5 is above the peak"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "line"), [(m[1:3], m[3]) for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_one_mistake_gives_one_line(problems_of, change, line):
    found = problems_of(change)
    assert len(found) == 1, found
    assert line in found[0]
    assert "\n" not in found[0]


def test_there_are_enough_of_them():
    assert len(MISTAKES) == 50
    assert len({m[0] for m in MISTAKES}) == 50


def test_the_sound_recipe_has_none(problems_of):
    assert problems_of() == []
