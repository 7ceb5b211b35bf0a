"""Exchanges on a device: a world of one over its backend, and a simulated one, against float64."""

import pytest
import torch
import torch.distributed as dist

from dist_siglip.distributed.groups import connect_ranks, control_of, transfers_of
from dist_siglip.distributed.simulate import simulated_world
from dist_siglip.losses import siglip_loss
from tests.support.devices import on_devices
from tests.support.parity import EXCHANGES

ROWS, WIDTH, WORLD = 24, 16, 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def leaves(device="cpu", dtype=torch.float64, copies=1):
    torch.manual_seed(3)
    sides = torch.nn.functional.normalize(torch.randn(2, ROWS, WIDTH, dtype=torch.float64), dim=-1)
    # Rounded first, so that all precisions see the same numbers.
    sides = sides.bfloat16().to(device, dtype).repeat(1, copies, 1)
    scalars = torch.tensor([10.0, -5.0], device=device, dtype=torch.float64)
    scalars = scalars.to(torch.promote_types(dtype, torch.float32))
    return tuple(value.clone().requires_grad_() for value in (*sides, *scalars))


def run(inputs, **options):
    loss = siglip_loss(*inputs, **options)
    loss.backward()
    return loss.detach(), inputs[0].grad, inputs[1].grad


def enter(device, folder):
    dist.init_process_group(
        BACKENDS[device],
        init_method=f"file://{folder}/rendezvous",
        rank=0,
        world_size=1,
        device_id=torch.device("cuda", 0) if device == "cuda" else None,
    )


@on_devices
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_world_of_one_gives_what_one_process_gives(exchange, dtype, device, tmp_path):
    enter(device, tmp_path)
    connect_ranks(torch.device(device))
    found = run(leaves(device, dtype), exchange=exchange)
    for value, exact in zip(found, run(leaves()), strict=True):
        torch.testing.assert_close(
            value.cpu().double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


@on_devices
@pytest.mark.parametrize("exchange", [name for name in EXCHANGES if name != "all_gather"])
def test_a_simulated_world_gives_the_loss_of_its_global_batch(exchange, device):
    """Every absent rank is a copy of this one; all_gather's fake reduction adds nothing."""
    with simulated_world(WORLD, local_world_size=2):
        loss, images, _ = run(leaves(device, torch.float32), exchange=exchange)
    exact, whole, _ = run(leaves(copies=WORLD))
    torch.testing.assert_close(loss.cpu().double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(images.cpu().double() / WORLD, whole[:ROWS], atol=1e-5, rtol=1e-4)


@on_devices
def test_companions_are_made_beside_the_group(device, tmp_path):
    enter(device, tmp_path)
    world = dist.group.WORLD
    made = transfers_of(world, torch.device(device), across_nodes=True)
    assert transfers_of(world, torch.device(device)) is made
    assert control_of(world).group is not world
    assert dist.get_backend(control_of(world).group) == "gloo"
    assert dist.get_backend(made.group) == BACKENDS[device]
    if device == "cuda":
        assert made.channel is not made.crossing
