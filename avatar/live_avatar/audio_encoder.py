"""Causal audio encoder: speech features of video frames to tokens of latent frames."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class AudioTokens(NamedTuple):
    """global_: [A, F, 1, D], what the whole latent frame sounds like; local: [A, F, 5, D], four tokens and padding."""

    global_: Tensor
    local: Tensor


class CausalConv(nn.Module):
    """Convolution over time, kernel 3, which sees the past only: two copies of the first frame on the left.

    Computed in float32 whatever the weights are stored in, then LayerNorm over channels and SiLU.
    """

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, kernel_size=3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [N, in_dim, T] -> [N, out_dim, ceil(T / stride)], before norm and activation."""
        x = F.pad(x, (2, 0), mode="replicate")
        return F.conv1d(x, self.conv.weight.float(), self.conv.bias.float(), stride=self.conv.stride)


def norm_silu(x: Tensor) -> Tensor:
    """LayerNorm over the channels of x [N, C, T] (no affine, eps 1e-6), then SiLU."""
    return F.silu(F.layer_norm(x.mT, x.shape[1:2], eps=1e-6)).mT


class Encoder(nn.Module):
    """Two paths through shared convolutions, each T -> ceil(ceil(T / 2) / 2): four local tokens and one global."""

    def __init__(self, in_dim: int, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.conv1_local = CausalConv(in_dim, dim // 4 * heads)
        self.conv1_global = CausalConv(in_dim, dim // 4)
        self.conv2 = CausalConv(dim // 4, dim // 2, stride=2)
        self.conv3 = CausalConv(dim // 2, dim, stride=2)
        self.final_linear = nn.Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> AudioTokens:
        """x: float32 [A, in_dim, T] -> float32 tokens of ceil(ceil(T / 2) / 2) latent frames."""
        batch = x.shape[0]
        local = rearrange(self.conv1_local(x), "a (heads c) t -> (a heads) c t", heads=self.heads)
        # The heads and the global path go through conv2 and conv3 together, as one batch.
        h = norm_silu(torch.cat([local, self.conv1_global(x)]))
        h = norm_silu(self.conv3(norm_silu(self.conv2(h))))
        local, global_ = h[: batch * self.heads], h[batch * self.heads :]
        local = rearrange(local, "(a heads) d f -> a f heads d", heads=self.heads)
        padding = self.padding_tokens.float().expand(*local.shape[:2], -1, -1)
        global_ = F.linear(global_.mT, self.final_linear.weight.float(), self.final_linear.bias.float())
        return AudioTokens(rearrange(global_, "a f d -> a f 1 d"), torch.cat([local, padding], dim=2))


class CausalAudioEncoder(nn.Module):
    """A learnt mix of the speech model's layers (where it has several), then the encoder."""

    def __init__(self, in_dim: int, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(1, layers, 1, 1)) if layers > 1 else None
        self.encoder = Encoder(in_dim, dim, heads)

    def forward(self, features: Tensor) -> AudioTokens:
        """features: [A, layers, C, T] -> float32 tokens of ceil(ceil(T / 2) / 2) latent frames."""
        if self.weights is None:
            return self.encoder(features[:, 0].float())
        # The products are rounded to the storage type, as in the reference; quotient and sum are float32.
        weights = F.silu(self.weights)
        mixed = (features.to(weights.dtype) * weights).float() / weights.float().sum()
        return self.encoder(mixed.sum(dim=1))
