"""DistributedDataParallel on two ranks equals one process."""

from __future__ import annotations

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from two_ranks import assert_alike, backward, build, gradients, sgd, shared_factors, train, values

import glora_kernels as gk


def ddp_equals_one_process(rank, _, share, reentrant):
    model = build(share, reentrant, seed=1 + rank)  # the other rank's values are those of the first from here on
    # With reentrant checkpoints autograd accumulates into a shared factor once a segment; a static graph counts that.
    ddp = nn.parallel.DistributedDataParallel(model, static_graph=reentrant is True)
    alone = build(share)
    backward(ddp, 0, rank)
    backward(alone, 0)
    assert_alike(gradients(model), gradients(alone))
    train(ddp, sgd(ddp), range(3), rank)
    train(alone, sgd(alone), range(3))
    assert_alike(values(model), values(alone))
    assert len(shared_factors(model)) == {"A": 3, "AB": 6}[share]


def ddp_has_a_shared_factor_in_one_bucket_once(rank, _):
    model = build("AB")
    seen = []

    def hook(state, bucket):
        seen.extend(bucket.parameters())
        return allreduce_hook(state, bucket)

    ddp = nn.parallel.DistributedDataParallel(model)
    ddp.register_comm_hook(None, hook)
    backward(ddp, 0, rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, seen)) == sorted(map(id, trained))
    groups = gk.parameter_groups(ddp)
    assert len(groups) == 1
    assert list(map(id, groups[0]["params"])) == list(map(id, trained))
    assert gk.trainable_parameters(ddp) == gk.trainable_parameters(build("AB"))
