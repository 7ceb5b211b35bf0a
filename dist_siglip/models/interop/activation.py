"""The transformers name of an activation layer."""

import torch
import torch.nn.functional as F
from torch import nn

from dist_siglip.errors import UserError


def activation_name(layer: nn.Module) -> str:
    """Return the name transformers has for an activation, found by what it computes.

    open_clip, timm and torch have several classes of the same function.

    Raises:
        UserError: If it is none of the three of dual encoders.

    Example:
        >>> activation_name(nn.GELU()), activation_name(nn.GELU(approximate="tanh"))
        ('gelu', 'gelu_pytorch_tanh')
    """
    probe = torch.linspace(-4, 4, 65)
    found = layer(probe.clone())
    for name, values in (
        ("gelu", F.gelu(probe)),
        ("gelu_pytorch_tanh", F.gelu(probe, approximate="tanh")),
        ("quick_gelu", probe * torch.sigmoid(1.702 * probe)),
    ):
        # The three differ by 4e-4 and more.
        if torch.allclose(found, values, rtol=0, atol=1e-5):
            return name
    raise UserError(f"activation {type(layer).__name__} is neither GELU nor QuickGELU")
