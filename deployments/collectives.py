"""`mixtral-serve doctor --collectives`: do ranks on this machine exchange rows rightly, and go on when one is killed?

Prints each thing that was tried as it comes. The trying is cluster/collectives_check.py's.
"""

from __future__ import annotations

from cluster.rendezvous import Transport, has_shared_memory

CPU_RANKS = 2
MAX_RANKS = 16


def examine_collectives(ranks: int | None) -> bool:
    """Over every transport of this machine; whether all went well. Without a number: one rank per GPU, or two."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus >= (ranks or 2):
        return _try(ranks or gpus, ["nccl"], "cuda")
    if gpus:
        print(f"{ranks or 2} ranks need as many GPUs and there are {gpus}: tried on the CPU instead.")
    transports: list[Transport] = ["shared_memory", "gloo"] if has_shared_memory() else ["gloo"]
    return _try(ranks or CPU_RANKS, transports, "cpu")


def _try(ranks: int, transports: list[Transport], device: str) -> bool:
    from cluster.collectives_check import check

    well = True
    for transport in transports:
        for outcome in check(ranks, transport, device):
            state = "ok  " if outcome.fault is None else "bad "
            print(f"{state}  {outcome.what:<52} {outcome.seconds:7.2f} s", flush=True)
            if outcome.fault is not None:
                print(f"      {outcome.fault}")
                well = False
    return well
