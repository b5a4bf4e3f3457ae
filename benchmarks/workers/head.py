"""Case F: the output layer and its cross-entropy alone, forward and backward, one way per process.

Hidden states in the step's type, the weight in fp32 as a trainer holds it, autocast as in training. Checked figures:
the loss and the norms of both gradients. Memory is the peak above what the operands themselves take.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.meter import Meter, matmul_rate, peak_memory, reset_peak_memory, write_record

VOCAB, DIM, TOKENS = 56_320, 512, 8_192


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """llmrecipes.losses, as PretrainModule calls it."""
    from llmrecipes.losses import linear_cross_entropy

    total, count = linear_cross_entropy(hidden, weight, labels)
    return total / count


def transformers(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What every causal model of transformers does."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = F.linear(hidden, weight)
    return ForCausalLMLoss(logits[None], labels[None], VOCAB, shift_labels=labels[None])


def litgpt(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """litgpt's pretraining loss: temporaries of 128 rows, logits whole."""
    from litgpt.utils import chunked_cross_entropy

    return chunked_cross_entropy(F.linear(hidden, weight)[None], labels[None])


def torch_fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's own function in chunks, with the options it chooses itself."""
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    return F.linear_cross_entropy(hidden, weight.to(hidden.dtype), labels, options=LinearCrossEntropyOptions())


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "transformers": transformers,
    "litgpt": litgpt,
    "torch": torch_fused,
}


def main() -> None:
    """One record, a unit of work per forward and backward."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=list(WAYS))
    parser.add_argument("--dtype", choices=["bf16", "fp32"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    asked = parser.parse_args()
    way, kind = WAYS[asked.way], {"bf16": torch.bfloat16, "fp32": torch.float32}[asked.dtype]
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, DIM).to(kind).requires_grad_()
    weight = (0.02 * torch.randn(VOCAB, DIM)).requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS,))
    with torch.autocast("cpu", torch.bfloat16, enabled=asked.dtype == "bf16"):
        way(hidden[:8], weight, labels[:8])  # imports
    meter, resident = Meter(), reset_peak_memory()
    for _ in range(asked.steps):
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=asked.dtype == "bf16"):
            loss = way(hidden, weight, labels)
        loss.backward()
        meter.mark()
    assert hidden.grad is not None and weight.grad is not None
    meter.checks = [loss.item(), hidden.grad.float().norm().item(), weight.grad.float().norm().item()]
    extra = {"memory_mib": peak_memory() - resident, "matmul_gflop_per_cpu_s": matmul_rate(asked.dtype)}
    write_record(meter.record() | extra)


if __name__ == "__main__":
    main()
