"""``llmrecipes budget``, from its parsed options."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict

from llmrecipes.errors import UserError
from llmrecipes.plan.budget import CHINCHILLA, DAY, Budget, optimal, over_training, solve
from llmrecipes.plan.hardware import GPUs, parse_gpus
from llmrecipes.plan.units import duration, short_count


def run(args: Namespace) -> int:
    """Print a budget, a fit, or both.

    Raises:
        UserError: options that do not determine an answer.
    """
    if args.plot and not args.fit:
        raise UserError("--plot has no effect without --fit")
    if not args.fit and not args.gpus:
        raise UserError("say --gpus NxNAME and two of --days, --mfu, --tokens; or --fit FILE")
    result: dict[str, object] = {}
    texts = []
    if args.gpus:
        gpus, params, per_token = parse_gpus(args.gpus), *_model(args)
        budget = _solve(args, gpus, per_token)
        result["budget"] = _as_dict(budget, gpus, params)
        texts.append(_show(budget, gpus, params))
    if args.fit:
        from llmrecipes.plan.scaling import draw, fit, read_points, show_fit

        points = read_points(args.fit)
        found = fit(points)
        result["fit"] = found.as_dict(args.params, args.tokens)
        texts.append(show_fit(found, args.params, args.tokens))
        if args.plot:
            draw(found, args.plot)
            texts.append(f"plot {args.plot}")
    print(json.dumps(result) if args.json else "\n\n".join(texts))
    return 0


def _model(args: Namespace) -> tuple[float, float]:
    """Active parameters and FLOPs per token."""
    if (args.params is None) == (args.recipe is None):
        raise UserError("say how large the model is: --params 10B, or --recipe FILE, one of the two")
    if args.params is not None:
        return args.params, 6 * args.params
    from llmrecipes.plan.job import read_job

    job = read_job([args.recipe])
    return job.config.active_params, job.config.flops_per_token(job.seq_len)


def _solve(args: Namespace, gpus: GPUs, per_token: float) -> Budget:
    seconds = args.days * DAY if args.days else None
    given = [name for name in ("days", "mfu", "tokens") if getattr(args, name) is not None]
    if len(given) != 2:
        said = ", ".join(f"--{name}" for name in given) or "none"
        raise UserError(f"say two of --days, --mfu and --tokens, the third follows; there is {said}")
    return solve(gpus.peak, per_token, seconds, args.mfu, args.tokens)


def _as_dict(budget: Budget, gpus: GPUs, params: float) -> dict[str, object]:
    best, tokens = optimal(budget.flops)
    return asdict(budget) | {
        "days": budget.seconds / DAY,
        "gpus": gpus.count,
        "gpu": gpus.gpu.name,
        "params": params,
        "flops": budget.flops,
        "tokens_per_param": budget.tokens / params,
        "over_training": over_training(params, budget.tokens),
        "optimal": {"params": best, "tokens": tokens},
    }


def _show(budget: Budget, gpus: GPUs, params: float) -> str:
    best, tokens = optimal(budget.flops)
    ratio = over_training(params, budget.tokens)
    word = "compute-optimal" if 0.8 <= ratio <= 1.25 else "over-trained: cheaper to use" if ratio > 1 else "too few"
    lines = [
        f"{gpus.count} x {gpus.gpu.name} at {gpus.gpu.peak / 1e12:g} TFLOP/s (dense, 16 bit)",
        f"  time               {duration(budget.seconds)}",
        f"  MFU                {budget.mfu:.1%}{_plausible(budget.mfu)}",
        f"  tokens             {short_count(budget.tokens)}",
        f"  FLOPs              {budget.flops:.3g}  ({budget.flops_per_token:.3g} a token)",
        f"  tokens/parameter   {budget.tokens / params:.1f}  = {ratio:.2f} x Chinchilla's {CHINCHILLA:g} ({word})",
        f"  optimum for these FLOPs: {short_count(best)} parameters on {short_count(tokens)} tokens",
    ]
    return "\n".join(lines)


def _plausible(mfu: float) -> str:
    if mfu > 1:
        return "  impossible"
    if mfu > 0.6:
        return "  not reached in 16 bit so far (large trainings report 30 to 55 %); FP8 at best"
    return "  optimistic (large trainings report 30 to 55 %)" if mfu > 0.5 else ""
