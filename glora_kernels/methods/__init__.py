"""What training methods are made of: ranks given out, edited, mapped, merged and restarted; layers observed."""

from glora_kernels.methods.allocate import allocate, intrinsic_dimensions, intrinsic_ranks, linear_ranks, with_ranks
from glora_kernels.methods.edit import edit_ranks, set_rank, snapshot
from glora_kernels.methods.mids import fold_mids, mids, set_mid, tasks
from glora_kernels.methods.observe import observe
from glora_kernels.methods.optimizers import optimizer
from glora_kernels.methods.restart import restart
from glora_kernels.methods.using import using

__all__ = [
    "allocate",
    "edit_ranks",
    "fold_mids",
    "intrinsic_dimensions",
    "intrinsic_ranks",
    "linear_ranks",
    "mids",
    "observe",
    "optimizer",
    "restart",
    "set_mid",
    "set_rank",
    "snapshot",
    "tasks",
    "using",
    "with_ranks",
]
