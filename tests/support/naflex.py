"""A small NaFlex model, the fixed one of the same weights, and pictures of several shapes."""

import torch

from dist_siglip.data.samples.patches import pack_pictures
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.weights import NETWORK_PREFIX
from tests.support.tiny_models import ARCHITECTURES, write_config

SIDE = 8  # of a patch
GRIDS = ((8, 8), (4, 16), (16, 4), (5, 9), (7, 8), (1, 40))
FIXED = {
    **ARCHITECTURES["siglip"],
    "vision_cfg": {
        "image_size": 64,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_pool": "map",
        "timm_proj": "none",
        "patch_size": SIDE,
        "width": 64,
        "layers": 2,
        "head_width": 32,
        "mlp_ratio": 2.5,
        "act_kwargs": {"approximate": "tanh"},
    },
}


def write_models(folder):
    """Write a config and random weights of a fixed tower; return the names of both."""
    torch.manual_seed(0)
    model = write_config(folder / "fixed.json", FIXED)
    network = build_dual_encoder(model).encoder.clip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(network.visual.trunk.pos_embed, std=2)  # places are to matter
    tensors = {
        **network.state_dict(),
        "logit_scale": torch.tensor(2.0),
        "logit_bias": torch.tensor(-3.0),
    }
    torch.save(tensors, folder / "fixed.pt")
    return model, str(folder / "fixed.pt")


def state_of(built):
    """Tensors by open_clip's names."""
    state = built.encoder.state_dict()
    return {name.removeprefix(NETWORK_PREFIX): value for name, value in state.items()}


def packed_of(grids=GRIDS, num_patches=64, seed=0, dtype=torch.float32):
    """Packed noise, a picture of each grid."""
    generator = torch.Generator().manual_seed(seed)
    pictures = [
        torch.randn(3, rows * SIDE, columns * SIDE, generator=generator, dtype=dtype)
        for rows, columns in grids
    ]
    return torch.stack([pack_pictures(picture, SIDE, num_patches) for picture in pictures])
