"""What depends on the number of processes: strategies, meshes, sums over ranks, gradient clipping by the global norm."""

from llmrecipes.distributed.clip import clip_grad_norm
from llmrecipes.distributed.collectives import all_reduce_sum, num_ranks, packed_sum
from llmrecipes.distributed.strategy import ShardedStrategy

__all__ = ["ShardedStrategy", "all_reduce_sum", "clip_grad_norm", "num_ranks", "packed_sum"]
