"""Ranks for a test start quickly: they are forked from one process that has already imported everything."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

_PRELOAD = ["tests.support.preload"]


def run_ranks(num_ranks: int, function: Callable[..., None], *arguments: Any, timeout_s: float = 240) -> None:
    """Run `function(*arguments)` in `num_ranks` processes with torchrun's environment. Fails if one of them fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [
        context.Process(target=_rank, args=(rank, num_ranks, port, function, arguments)) for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(timeout_s)
        assert [rank.exitcode for rank in ranks] == [0] * num_ranks
    finally:
        for rank in ranks:
            rank.kill()


def _rank(rank: int, num_ranks: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
    import torch

    torch.set_num_threads(1)
    function(*arguments)
    torch.distributed.destroy_process_group()
