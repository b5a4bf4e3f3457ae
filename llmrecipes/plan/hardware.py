"""GPUs by name: memory, peak and bandwidth from the makers' data sheets. Torch-free."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from llmrecipes.errors import UserError


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Attributes:
        name: as it is written after ``--gpus``.
        memory: bytes, as sold (GiB for NVIDIA's round numbers).
        peak: dense 16-bit FLOP/s with sums in fp32, without sparsity.
        bandwidth: of its memory, bytes/s.
        bf16: whether it computes in bf16 natively; the others have fp16 only.
        source: where the figures stand.
    """

    name: str
    memory: float
    peak: float
    bandwidth: float
    source: str
    bf16: bool = True


def _gpu(name: str, teraflops: float, terabytes: float, source: str, bf16: bool = True) -> GPU:
    gigabytes = int(name.rpartition("-")[2].removesuffix("G"))
    return GPU(name, gigabytes * 2.0**30, teraflops * 1e12, terabytes * 1e12, source, bf16)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("B200-180G", 2250, 8.0, "NVIDIA DGX B200 datasheet (half of the sparse figure)"),
        _gpu("H200-141G", 989, 4.8, "NVIDIA H200 datasheet, SXM (half of the sparse figure)"),
        _gpu("H100-80G", 989, 3.35, "NVIDIA H100 datasheet, SXM5 (half of the sparse figure)"),
        _gpu("H100-PCIE-80G", 756, 2.0, "NVIDIA H100 datasheet, PCIe (half of the sparse figure)"),
        _gpu("A100-80G", 312, 2.039, "NVIDIA A100 datasheet, SXM4"),
        _gpu("A100-40G", 312, 1.555, "NVIDIA A100 datasheet, SXM4"),
        _gpu("L40S-48G", 362, 0.864, "NVIDIA L40S datasheet (half of the sparse figure)"),
        _gpu("L4-24G", 121, 0.300, "NVIDIA L4 datasheet (half of the sparse figure)"),
        _gpu("A10-24G", 125, 0.600, "NVIDIA A10 datasheet"),
        _gpu("A6000-48G", 155, 0.768, "NVIDIA GA102 whitepaper, RTX A6000 (154.8)"),
        _gpu("RTX5090-32G", 209.5, 1.792, "NVIDIA RTX Blackwell whitepaper, sums in fp32"),
        _gpu("RTX4090-24G", 165, 1.008, "NVIDIA Ada whitepaper, sums in fp32 (165.2)"),
        _gpu("RTX3090-24G", 71, 0.936, "NVIDIA GA102 whitepaper, sums in fp32"),
        _gpu("V100-32G", 125, 0.900, "NVIDIA V100 datasheet, SXM2, fp16", bf16=False),
        _gpu("V100-16G", 125, 0.900, "NVIDIA V100 datasheet, SXM2, fp16", bf16=False),
        _gpu("T4-16G", 65, 0.320, "NVIDIA T4 datasheet, fp16", bf16=False),
    )
}


@dataclass(frozen=True)
class GPUs:
    """A number of equal GPUs."""

    count: int
    gpu: GPU

    @property
    def peak(self) -> float:
        """Of all of them, FLOP/s."""
        return self.count * self.gpu.peak


def parse_gpus(text: str) -> GPUs:
    """``24xH100-80G``, ``H100-80Gx24`` or ``RTX3090``; the memory may be left out where there is one kind only.

    Raises:
        UserError: no such form, or no such GPU, with the nearest names.
    """
    compact = text.strip().upper().replace(" ", "").replace("*", "X").replace("GB", "G")
    found = re.fullmatch(r"(\d+)X(.+)|(.+?)X(\d+)|(.+)", compact)
    count_text, name = (found[1] or found[4] or "1", found[2] or found[3] or found[5]) if found else ("0", "")
    if int(count_text) < 1:
        raise UserError(f"--gpus {text}: write a number and a name, such as 24xH100-80G or RTX3090")
    if name in GPUS:
        return GPUs(int(count_text), GPUS[name])
    short = [known for known in GPUS if known.rpartition("-")[0] == name]
    if len(short) == 1:
        return GPUs(int(count_text), GPUS[short[0]])
    known = short or difflib.get_close_matches(name, list(GPUS), 3, 0.5)
    hint = f"did you mean {' or '.join(known)}?" if known else "known: " + ", ".join(GPUS)
    raise UserError(f"--gpus {text}: there is no '{name}' in the table - {hint}")
