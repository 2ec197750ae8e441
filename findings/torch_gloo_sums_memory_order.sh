#!/usr/bin/env bash
# torch 2.15.0, gloo: collectives on equal matrices, one row-major and one column-major in memory.
#
# Guess:     all_reduce adds the elements of equal index; broadcast gives every rank the matrix of rank 0. A tensor whose memory order cannot
#            be used is refused or copied.
# Behaviour: a transposed matrix (dense, so accepted as contiguous enough) is sent as it lies in memory: all_reduce adds elements of different
#            index and the two ranks end with different sums, broadcast shuffles the matrix. all_gather does copy, and is right.
# Seen:      prints "all_reduce right on rank 0: False, on rank 1: False, broadcast right: False, all_gather right: True"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.15.0 numpy==2.4.6
cat > "$work/ranks.py" <<'P'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = torch.arange(6.0).reshape(2, 3)
    columns = rows.T.contiguous().T
    assert torch.equal(rows, columns)
    mine = columns if rank == 0 else rows
    summed = mine.clone()
    dist.all_reduce(summed)
    sent = columns.clone() if rank == 0 else torch.zeros(2, 3)
    dist.broadcast(sent, 0)
    gathered = [torch.zeros(2, 3) for _ in range(2)]
    dist.all_gather(gathered, mine.clone())
    right = [torch.equal(summed, 2 * rows), torch.equal(sent, rows), torch.equal(gathered[0], rows) and torch.equal(gathered[1], rows)]
    torch.save(right, f"{folder}/{rank}.pt")


if __name__ == "__main__":
    mp.spawn(run, args=(sys.argv[1],), nprocs=2)
    one, two = (torch.load(f"{sys.argv[1]}/{rank}.pt") for rank in range(2))
    print(f"all_reduce right on rank 0: {one[0]}, on rank 1: {two[0]}, broadcast right: {two[1]}, all_gather right: {one[2] and two[2]}")
    assert [one[0], two[0], two[1], one[2] and two[2]] == [False, False, False, True], "this has changed"
P
"$work/venv/bin/python" "$work/ranks.py" "$work"
