"""Random shifts and intensities of images (Yarats et al., 2021, https://arxiv.org/abs/2004.13649)."""

from __future__ import annotations

import torch as th
from torch.nn import functional as F


def random_shift(images: th.Tensor, pixels: int) -> th.Tensor:
    """
    Shift every image by up to so many pixels; edges are repeated. All planes of an image move together.

    :param images: ``[B, C, H, W]``, float
    :param pixels: largest shift along each axis
    :return: ``[B, C, H, W]``
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    down, right = th.randint(2 * pixels + 1, (2, batch, 1), device=images.device)
    rows = (down + th.arange(height, device=images.device))[:, None, :, None]
    columns = (right + th.arange(width, device=images.device))[:, None, None, :]
    which = th.arange(batch, device=images.device)[:, None, None, None]
    planes = th.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[which, planes, rows, columns]


def random_intensity(images: th.Tensor, scale: float) -> th.Tensor:
    """
    Multiply every image by ``1 + scale * clip(N(0, 1), -2, 2)``.

    :param images: ``[B, C, H, W]``, float
    :param scale: strength
    :return: ``[B, C, H, W]``
    """
    noise = th.randn(len(images), 1, 1, 1, device=images.device).clamp(-2, 2)
    return images * (1 + scale * noise)
