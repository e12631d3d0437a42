"""Started by test_partition.py under torchrun: samples a graph in groups of the first 1, 2, .. processes.

Usage: torchrun partition_worker.py GRAPH.npz FOLDER DEVICE SIZE... (GRAPH has rowptr, col, weight, owner_SIZE).
"""

from __future__ import annotations

import datetime
import sys

import numpy as np
import torch
import torch.distributed as dist

from geo.kernels import sample_partitioned


def refused(**arguments) -> str:
    try:
        sample_partitioned(**arguments)
    except (IndexError, RuntimeError, ValueError) as err:
        return f"{type(err).__name__}: {err}"
    return "accepted"


def main() -> None:
    path, folder, device, *sizes = sys.argv[1:]
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=datetime.timedelta(seconds=240))
    rank = dist.get_rank()
    with np.load(path) as file:
        whole = {name: torch.from_numpy(file[name]).to(device) for name in file.files}
    rowptr, col, weight = (whole[name] for name in ("rowptr", "col", "weight"))
    num_nodes = rowptr.size(0) - 1
    row = torch.arange(num_nodes, device=device).repeat_interleave(rowptr.diff())
    for size in map(int, sizes):
        group = dist.new_group(list(range(size)))
        if rank >= size:
            continue
        blocks = torch.arange(num_nodes, device=device) * size // max(num_nodes, 1)
        for name, owner in (("blocks", blocks), ("owner", whole[f"owner_{size}"])):
            mine = owner[row] == rank
            count = rowptr.diff()[owner == rank]
            rows = {
                "rowptr": torch.cat([count.new_zeros(1), count.cumsum(0)]),
                "col": col[mine],
                "weight": weight[mine],
            }
            rows |= {"owner": None if name == "blocks" else owner, "num_walks": 4, "seed": 2**63 + 5, "group": group}
            deposits, traffic = sample_partitioned(**rows, p_halt=0.2)
            said = [
                refused(**{**rows, "seed": rank}),
                refused(**{**rows, "col": rows["col"] + num_nodes * (rank == size - 1)}),
                refused(**{**rows, "num_walks": 4 + (rank == size - 1)}),
                refused(**{**rows, "node_key": torch.arange(num_nodes, device=device) + 7 * rank}),
            ]
            np.savez(
                f"{folder}/{name}_{size}_{rank}.npz",
                **{key: value.cpu().numpy() for key, value in deposits._asdict().items()},
                nodes=(owner == rank).nonzero().flatten().cpu().numpy(),
                traffic=np.array(traffic),
                said=np.array(said),
            )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
