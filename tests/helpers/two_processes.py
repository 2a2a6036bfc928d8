"""Run a function in several gloo processes on this machine, and collect what they return."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2


def _process(
    rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def in_processes(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(0, *arguments), function(1, *arguments), ...]; an error of any process is raised."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (ranks, folder, function, arguments), nprocs=ranks)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]


def in_two_processes(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(0, *arguments), function(1, *arguments)]; an error of either process is raised."""
    return in_processes(RANKS, function, *arguments)
