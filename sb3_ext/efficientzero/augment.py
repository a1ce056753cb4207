"""Random shifts and intensities of images (Yarats et al., 2021, https://arxiv.org/abs/2004.13649)."""

from __future__ import annotations

import torch as th


def random_shift(images: th.Tensor, pixels: int) -> th.Tensor:
    """
    Shift every image by up to so many pixels; edges are repeated. All planes of an image move together.

    :param images: ``[B, C, H, W]``; bytes are the cheapest
    :param pixels: largest shift along each axis, P
    :return: ``[B, C, H, W]``
    """
    batch, planes, height, width = images.shape
    p = pixels
    padded = images.new_empty(batch, planes, height + 2 * p, width + 2 * p)
    padded[:, :, p : p + height, p : p + width] = images
    padded[:, :, :p] = padded[:, :, p : p + 1]
    padded[:, :, p + height :] = padded[:, :, p + height - 1 : p + height]
    padded[..., :p] = padded[..., p : p + 1]
    padded[..., p + width :] = padded[..., p + width - 1 : p + width]
    down, right = th.randint(2 * p + 1, (2, batch, 1), device=images.device).squeeze(2)
    # [B, C, 2 P + 1, 2 P + 1, H, W]: a view of every shift
    shifts = padded.unfold(2, height, 1).unfold(3, width, 1)
    return shifts[th.arange(batch, device=images.device), :, down, right]


def random_intensity(images: th.Tensor, scale: float) -> th.Tensor:
    """
    Multiply every image by ``1 + scale * clip(N(0, 1), -2, 2)``.

    :param images: ``[B, C, H, W]``
    :param scale: strength
    :return: ``[B, C, H, W]``, float
    """
    noise = th.randn(len(images), 1, 1, 1, device=images.device).clamp(-2, 2)
    return images.float() * (1 + scale * noise)  # bytes times floats takes four times as long on a CPU
