"""Ranks that differ are named, a mesh over the wrong processes is found, and so are gradients that were not summed."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llmrecipes.distributed import self_check
from llmrecipes.distributed.self_check import (
    check_agreement,
    check_first_gradient,
    check_sums,
    disagreements,
    gradient_digest,
    gradient_problems,
)
from llmrecipes.errors import UserError

HOST = socket.gethostname()
CPU = torch.device("cpu")


def test_those_that_differ_from_most_are_named():
    def rank(host, **facts):
        return host, {name.replace("_", "."): value for name, value in facts.items()}

    same = {"torch": "2.13", "data_seed": "1"}
    assert list(disagreements([rank("n0", **same)] * 3)) == []
    found = list(disagreements([rank("n0", **same), rank("n1", **same | {"data_seed": "2"}), rank("n2", **same)]))
    assert found == ["rank 1 on n1 differs in data.seed: 2; rank 0 on n0 has 1"]
    found = list(disagreements([rank("n0", **same | {"torch": "2.12"}), rank("n1", **same), rank("n2", **same)]))
    assert found == ["rank 0 on n0 differs in torch: 2.12; rank 1 on n1 has 2.13"]
    half = [rank("n0", **same)] * 2 + [rank("n1", torch="2.13")] * 2
    assert list(disagreements(half)) == ["ranks 2 on n1, 3 on n1 differ in data.seed: nothing; rank 0 on n0 has 1"]


def outcome(function, *args):
    """Nothing, or the user's error; on ranks of a gloo group."""
    dist.init_process_group("gloo")
    try:
        function(*args)
    except UserError as error:
        return list(error.problems)
    return []


def differ_on_rank_1():
    check_agreement({"recipe.seed": 5 if dist.get_rank() == 1 else 4, "data.tokens": 100})


def test_all_ranks_hear_the_same_disagreement():
    first, second = run_ranks(2, outcome, differ_on_rank_1)
    assert first == second == [f"rank 1 on {HOST} differs in recipe.seed: 5; rank 0 on {HOST} has 4"]


def sums(crossed: bool):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if crossed:  # NODE_RANK exchanged: the groups that were made are not those of the mesh's table
        right, wrong = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
        groups = {ranks[0]: dist.new_group(ranks) for ranks in wrong}
        mine = next(ranks for ranks in wrong if dist.get_rank() in ranks)
        expected = next(ranks for ranks in right if dist.get_rank() in ranks)
        problems = self_check._wrong_sum("the mesh dimension shard", groups[mine[0]], expected, CPU)
        if problems:
            raise UserError(*problems)
        return
    check_sums([mesh], CPU)


def test_sums_over_the_right_processes():
    assert run_ranks(4, outcome, sums, False) == [[]] * 4


def test_mutant_sums_over_other_processes_are_found():
    for rank, problems in enumerate(run_ranks(4, outcome, sums, True)):
        (problem,) = problems
        assert f"on rank {rank} (on {HOST}) instead of {[3, 3, 7, 7][rank]}" in problem


def first_gradient(fault: str | None):
    """A step on a mesh of 2 copies x 2 shares, with a fault on rank 3 or in the mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    fully_shard(model, mesh=mesh["shard"] if fault == "copies not summed" else mesh)
    model(torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
    digest = gradient_digest(model.parameters())
    if fault == "copies not summed":  # each copy was reduced alone; compare as the copies they are meant to be
        digest = dict(zip([("copies", rank % 2)], digest.values(), strict=True))
    norm = 1.5 if fault == "norm" and rank == 3 else 1.0
    check_first_gradient(digest, norm, loss=2.0)


def test_the_first_gradient_of_a_sound_job():
    assert run_ranks(4, outcome, first_gradient, None) == [[]] * 4


def test_copies_that_were_not_summed_are_found():
    every = run_ranks(4, outcome, first_gradient, "copies not summed")
    assert every[0] == every[1] == every[2] == every[3]
    assert [problem.split(" differs")[0] for problem in every[0]] == [f"rank 2 on {HOST}", f"rank 3 on {HOST}"]
    assert "reduced gradients" in every[0][0]


def test_another_norm_on_one_rank_is_found():
    (problem,), *_ = run_ranks(4, outcome, first_gradient, "norm")
    assert problem.startswith(f"rank 3 on {HOST} differs in the gradient norm of the first step: 1.5; rank 0 on {HOST}")


@pytest.mark.parametrize(
    ("a", "b", "equal"), [(1.0, 1.0 + 1e-7, True), (1.0, 1.01, False), (float("nan"),) * 2 + (True,)]
)
def test_rounding_is_no_disagreement(a, b, equal):
    gathered = [("n0", {}, {"gradient norm": a, "loss": 1.0}), ("n1", {}, {"gradient norm": b, "loss": 1.0})]
    assert (gradient_problems(gathered) == []) == equal
