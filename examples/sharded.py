"""FAM on several processes: FSDP2 with noise in every block, and a head that tensor parallelism splits by class.

    torchrun --nproc_per_node 2 examples/sharded.py               # CPU processes, a few seconds
    torchrun --nproc_per_node 2 examples/sharded.py --steps 200

Two trainings of one small network on the same made-up tokens. The first shards each block and the head (fully_shard): each
process takes its part of the batch. The second splits the head's vocabulary over the processes (ColwiseParallel, loss_parallel):
all take the whole batch, and none ever holds all logits. The regularized losses and kappa are printed as they fall.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

import fam_ext

VOCABULARY, WIDTH, TOKENS, BATCH = 100, 32, 8, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return out


class Model(nn.Module):
    """Predicts each token's successor from the token alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # the same start on every process
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.embedding(tokens))).flatten(0, 1)
        return out


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and their successors, a fifth of which are wrong; the same on every process."""
    random = torch.Generator().manual_seed(1)
    successor = torch.randperm(VOCABULARY, generator=random)
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=random)
        wrong = torch.randint(VOCABULARY, tokens.shape, generator=random)
        noisy = torch.rand(tokens.shape, generator=random) < 0.2
        yield tokens, torch.where(noisy, wrong, successor[tokens]).flatten()


def report(step: int, steps: int, text: str) -> None:
    if dist.get_rank() == 0 and (step % max(1, steps // 4) == 0 or step == steps - 1):
        print(f"  step {step:4d}  {text}", flush=True)


def fsdp(steps: int) -> None:
    """Every block and the head in a group of its own; relative flatness of the head in closed form, of the blocks by noise."""
    model = Model()
    for part in (*model.blocks, model.head):
        fully_shard(part)
    fully_shard(model)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(100 + rank)  # as for dropout: each process draws noise of its own
    ce = nn.CrossEntropyLoss()
    criterion = fam_ext.FAMLoss.for_model(ce, model, "blocks.*", strength=1e-4, method="noise")
    kappa = fam_ext.RelativeFlatness(ce, model.head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, (tokens, targets) in enumerate(batches(steps)):
        own, of_own = tokens.chunk(ranks)[rank], targets.chunk(ranks)[rank]
        outputs = model(own)
        flatness = kappa(outputs, of_own)
        loss = criterion(outputs, of_own) + 1e-4 * flatness
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = torch.stack([loss.detach(), flatness.detach()])
        dist.all_reduce(mean)
        report(step, steps, "loss {:.3f}, kappa of the head {:.3f}".format(*(mean / ranks).tolist()))


def tensor_parallel(steps: int) -> None:
    """A vocabulary that is split over the processes, and the loss and kappa of whole rows."""
    model = Model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"head": ColwiseParallel(use_local_output=False)})
    criterion = fam_ext.FAMLoss(nn.CrossEntropyLoss(), model.head, strength=1e-4)  # after parallelize_module
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, (tokens, targets) in enumerate(batches(steps)):
        with loss_parallel():
            criterion(model(tokens), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        last = criterion.last.as_dict()
        report(step, steps, f"loss {last['loss']:.3f}, kappa of the head {last['flatness']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="FAM under FSDP2 and tensor parallelism")
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc_per_node 2 examples/sharded.py")
    dist.init_process_group("gloo")
    for title, train in (("FSDP2, noise in the blocks", fsdp), ("head split by class", tensor_parallel)):
        if dist.get_rank() == 0:
            print(title, flush=True)
        train(steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
