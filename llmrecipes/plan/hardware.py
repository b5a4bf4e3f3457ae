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
    before, after = re.fullmatch(r"(\d+)X(.+)", compact), re.fullmatch(r"(.+)X(\d+)", compact)
    readings = [(int(before[1]), before[2])] if before else []
    readings.append((1, compact))  # RTX3090 ends like a number of RT
    readings += [(int(after[2]), after[1])] if after else []
    for count, name in readings:
        known = _named(name)
        if len(known) == 1 and count > 0:
            return GPUs(count, known[0])
    count, name = readings[0]
    if not name or count < 1:
        raise UserError(f"--gpus {text}: write a number and a name, such as 24xH100-80G or RTX3090")
    near = [gpu.name for gpu in _named(name)] or difflib.get_close_matches(name, list(GPUS), 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "known: " + ", ".join(GPUS)
    raise UserError(f"--gpus {text}: there is no '{name}' in the table - {hint}")


def _named(name: str) -> list[GPU]:
    """The GPU of this name, or all that have it without their memory."""
    return [GPUS[name]] if name in GPUS else [gpu for gpu in GPUS.values() if gpu.name.rpartition("-")[0] == name]
