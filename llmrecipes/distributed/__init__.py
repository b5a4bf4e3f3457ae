"""What depends on the number of processes: strategies and meshes, sums over ranks, self-check, dead and hung ranks."""

from llmrecipes.distributed.clip import clip_grad_norm
from llmrecipes.distributed.collectives import all_reduce_sum, num_ranks, packed_sum
from llmrecipes.distributed.compiled import compile_blocks
from llmrecipes.distributed.launcher import RankLauncher, ranks_end_together
from llmrecipes.distributed.progress import ReadMark, StepMarks
from llmrecipes.distributed.self_check import SelfCheck
from llmrecipes.distributed.strategy import ShardedStrategy

__all__ = [
    "RankLauncher",
    "ReadMark",
    "SelfCheck",
    "ShardedStrategy",
    "StepMarks",
    "all_reduce_sum",
    "clip_grad_norm",
    "compile_blocks",
    "num_ranks",
    "packed_sum",
    "ranks_end_together",
]
