"""The causal speech-to-video diffusion transformer of Live Avatar (Wan2.2-S2V), as it runs when it streams.

Letters in shapes: B sessions, c latent channels, F latent frames of a block, (h, w) latent size, n = rows * columns
tokens of a latent frame (rows = h / 2, columns = w / 2), N = F * n, D width, A actors, C conditioning tokens.

Numbers: weights of the type `dtype` (bfloat16 as released) keep the rounding points of the reference. The residual
stream is `dtype` between blocks and float32 inside one, norms and modulation are float32, the time embedding, the
audio encoder and the head are float32 throughout. With float32 weights none of this rounds anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audio.errors import AvatardError
from avatar.attention import apply_rope, attention, rope_table, sampled_positions
from avatar.cache import Conditioning, KVCache, Turn, stored
from avatar.live_avatar.audio_encoder import AudioTokens, CausalAudioEncoder
from avatar.sampling import PREFILL_POSITION, Enter, Pass, in_lockstep

MOTION_FRAMES = 19
"""Latent frames the frame packer reads, newest last: 16, then 2, then 1, at falling compression."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""What a block's queries look at: (q, k, v), each [B, N, heads, dim], normed and perhaps rotated -> [B, N, heads, dim].

None: only the keys and values were wanted, the block ends here.
"""


class Text(NamedTuple):
    """Keys and values of the prompt in one block, [B, M, heads, dim].

    The last token is the padding: it stands for `repeats` equal ones, text_len in all.
    """

    k: Tensor
    v: Tensor
    repeats: int = 1

    def padded(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all text_len tokens."""
        k, v = (torch.cat([x, x[:, -1:].expand(-1, self.repeats - 1, -1, -1)], dim=1) for x in (self.k, self.v))
        return k, v


TextKV = list[Text]
"""One for each block; empty where text is off."""


class ConfigMismatch(AvatardError):
    """A checkpoint's config.json describes another architecture than the one written here."""


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the transformer, under the names of the checkpoint's config.json; defaults are Wan2.2-S2V-14B.

    text_dim = 0, cond_dim = 0 and enable_framepack = False leave out the prompt, the pose and the motion tokens.
    audio_layers counts the speech model's layers that are mixed; with 1 there is nothing to mix.
    """

    dim: int = 5120
    ffn_dim: int = 13824
    freq_dim: int = 256
    in_dim: int = 16
    out_dim: int = 16
    num_heads: int = 40
    num_layers: int = 40
    text_dim: int = 4096
    text_len: int = 512
    cond_dim: int = 16
    audio_dim: int = 1024
    audio_layers: int = 25
    num_audio_token: int = 4
    audio_inject_layers: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
    enable_framepack: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "audio_inject_layers", tuple(self.audio_inject_layers))
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ConfigMismatch(f"num_heads: {self.num_heads} heads do not share a width of {self.dim} evenly")
        if self.dim % 4:
            raise ConfigMismatch(f"dim: {self.dim} is not a multiple of 4")
        if list(self.audio_inject_layers) != sorted(set(self.audio_inject_layers)):
            raise ConfigMismatch(f"audio_inject_layers: {list(self.audio_inject_layers)} is not in ascending order")
        if not all(0 <= layer < self.num_layers for layer in self.audio_inject_layers):
            raise ConfigMismatch(f"audio_inject_layers: a layer is not among the {self.num_layers} blocks")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DiTConfig:
        """Read a config.json. Unknown keys are ignored; one that would need other code raises ConfigMismatch."""
        for name, written in STRUCTURE.items():
            value = config.get(name, written)
            value = tuple(value) if isinstance(value, list) else value
            if value != written:
                raise ConfigMismatch(f"config.json: {name} is {value!r}, this network is written for {written!r}")
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in names})


STRUCTURE: dict[str, Any] = {
    "model_type": "s2v",
    "patch_size": (1, 2, 2),
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "enable_adain": True,
    "adain_mode": "attn_norm",
    "zero_timestep": True,
    "enable_motioner": False,
    "enable_tsm": False,
    "trainable_token_pos_emb": False,
    "framepack_drop_mode": "padd",
    "slide_motion_frames": False,
    "local_attn_size": -1,
}
"""Fields of config.json that choose between architectures, with the one choice written here."""


class Modulation(NamedTuple):
    """Shift, scale and gate of a block's self-attention and of its feed-forward part, float32 [B, 1, D] each."""

    shift_sa: Tensor
    scale_sa: Tensor
    gate_sa: Tensor
    shift_ffn: Tensor
    scale_ffn: Tensor
    gate_ffn: Tensor


class Injection(NamedTuple):
    """What one injector makes of a block's audio; the same for every denoising step.

    shift, scale: float32 [A, F, 1, D] (scale: 1 + scale); k, v: [A * F, 5, heads, dim].
    """

    shift: Tensor
    scale: Tensor
    k: Tensor
    v: Tensor


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Rounded before and after the weight, as in the reference.
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class Attention(nn.Module):
    """The projections of one attention; q and k are RMS-normed over the full width, not per head."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def queries(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, heads, dim]."""
        return self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, M, D] -> k, v [B, M, heads, dim]."""
        k, v = self.norm_k(self.k(x)), self.v(x)
        return k.unflatten(-1, (self.num_heads, -1)), v.unflatten(-1, (self.num_heads, -1))

    def output(self, attended: Tensor) -> Tensor:
        """[B, N, heads, dim] -> [B, N, D]."""
        return self.o(attended.flatten(2))

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Cross-attention of x [B, N, D] to keys and values [B, M, heads, dim] made before."""
        return self.output(attention(self.queries(x), k, v))


class Block(nn.Module):
    """Self-attention, cross-attention to the prompt (unless text is off), feed-forward."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.eps = eps
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / math.sqrt(dim))
        self.self_attn = Attention(dim, config.num_heads, eps)
        if config.text_dim:
            self.norm3 = nn.LayerNorm(dim, eps)
            self.cross_attn = Attention(dim, config.num_heads, eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )

    def modulate(self, e0: Tensor) -> Modulation:
        """e0: float32 [B, 6, D], the projected time embedding."""
        return Modulation(*(self.modulation.float() + e0).split(1, dim=1))

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    def qkv(self, x: Tensor, m: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, N, D] -> q, k, v [B, N, heads, dim]; q and k are normed and not rotated."""
        h = (self.norm(x) * (1 + m.scale_sa) + m.shift_sa).to(x.dtype)
        return self.self_attn.queries(h), *self.self_attn.keys_values(h)

    def finish(self, x: Tensor, attended: Tensor, m: Modulation, text: Text | None = None) -> Tensor:
        """The rest of the block. x: [B, N, D] as it came in; attended: [B, N, heads, dim]; text: the prompt's k, v."""
        dtype = x.dtype
        x = x + self.self_attn.output(attended) * m.gate_sa
        if text is not None:
            # The stream is rounded in front of this norm, and not in front of the next.
            x = x + self.cross_attn(self.norm3(x.to(dtype)), *text.padded())
        h = (self.norm(x) * (1 + m.scale_ffn) + m.shift_ffn).to(dtype)
        return (x + self.ffn(h) * m.gate_ffn).to(dtype)

    def before_attention(self, x: Tensor, e0: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, N, D] -> q, k, v [B, N, heads, dim]; q and k are rotated by rope [N, dim / 2, 2] where it is given."""
        q, k, v = self.qkv(x, self.modulate(e0))
        return (q, k, v) if rope is None else (apply_rope(q, rope), apply_rope(k, rope), v)

    def after_attention(self, x: Tensor, attended: Tensor, e0: Tensor, text: Text | None = None) -> Tensor:
        """x: [B, N, D] as it came in; attended: [B, N, heads, dim]; text: the prompt's k, v -> [B, N, D]."""
        return self.finish(x, attended, self.modulate(e0), text)

    def forward(
        self,
        x: Tensor,
        e0: Tensor,
        attend: Attend,
        text: Text | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        """x: [B, N, D]; attend: where the queries look, and what is remembered of the keys."""
        attended = attend(*self.before_attention(x, e0, rope))
        return x if attended is None else self.after_attention(x, attended, e0, text)


class Head(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / math.sqrt(config.dim))
        self.head = nn.Linear(config.dim, 4 * config.out_dim)

    def forward(self, x: Tensor, e: Tensor, rows: int, columns: int) -> Tensor:
        """x: [B, F * rows * columns, D], e: float32 [B, D] -> velocity [B, out_dim, F, 2 * rows, 2 * columns]."""
        shift, scale = (self.modulation.float() + e[:, None]).split(1, dim=1)
        h = F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift
        y = F.linear(h, self.head.weight.float(), self.head.bias.float()).to(x.dtype)
        return rearrange(y, "b (f row col) (ph pw c) -> b c f (row ph) (col pw)", row=rows, col=columns, ph=2, pw=2)


class FramePacker(nn.Module):
    """Motion frames to tokens: the newest frame fine, the two before it coarser, the sixteen before those coarsest.

    Source: FramePack (arXiv 2504.12626).
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_dim, dim, (1, 2, 2), (1, 2, 2))
        self.proj_2x = nn.Conv3d(in_dim, dim, (2, 4, 4), (2, 4, 4))
        self.proj_4x = nn.Conv3d(in_dim, dim, (4, 8, 8), (4, 8, 8))

    def forward(self, motion: Tensor) -> Tensor:
        """motion: [B, c, M, h, w], the last 19 count, missing ones are zero -> [B, near + mid + far, D]."""
        motion = motion[:, :, -MOTION_FRAMES:]
        motion = F.pad(motion, (0, 0, 0, 0, MOTION_FRAMES - motion.shape[2], 0))
        far, mid, near = motion.split((16, 2, 1), dim=2)
        return torch.cat([patches(near, self.proj), patches(mid, self.proj_2x), patches(far, self.proj_4x)], dim=1)


class AdaLayerNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """condition: [..., D] -> shift and 1 + scale, float32 [..., D]; the sum is rounded first."""
        shift, scale = self.linear(F.silu(condition)).chunk(2, dim=-1)
        return shift.float(), (1 + scale).float()


class AudioInjector(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        count = len(config.audio_inject_layers)
        self.injector = nn.ModuleList(Attention(config.dim, config.num_heads, config.eps) for _ in range(count))
        self.injector_adain_layers = nn.ModuleList(AdaLayerNorm(config.dim) for _ in range(count))

    def prepare(self, j: int, tokens: AudioTokens) -> Injection:
        """The part of injector j that does not depend on the picture."""
        shift, scale = self.injector_adain_layers[j](tokens.global_)
        return Injection(shift, scale, *self.injector[j].keys_values(tokens.local.flatten(0, 1)))

    def forward(self, j: int, x: Tensor, injection: Injection) -> Tensor:
        """What actor by actor is added to x. x: [A, F * n, D], or [1, ...] for all actors alike -> [A, F, n, D]."""
        return self.listen(self.injector[j], x, injection)

    @staticmethod
    def listen(attention: nn.Module, x: Tensor, injection: Injection) -> Tensor:
        """`forward`, with the injector's attention itself."""
        frames = injection.shift.shape[1]
        # eps 1e-5 here, 1e-6 everywhere else.
        h = F.layer_norm(x.float(), x.shape[-1:], eps=1e-5).unflatten(1, (frames, -1))
        h = (h * injection.scale + injection.shift).to(x.dtype)
        return attention(h.flatten(0, 1), injection.k, injection.v).unflatten(0, (-1, frames))


class CausalDiT(nn.Module):
    """Predicts the velocity of a block of noisy latents from the conditioning, the last blocks and the block's audio.

    Parameters carry the names of the released checkpoint (one of which is misspelt there).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, (1, 2, 2), (1, 2, 2))
        self.trainable_cond_mask = nn.Embedding(3, dim)
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.text_dim:
            gelu = nn.GELU(approximate="tanh")
            self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), gelu, nn.Linear(dim, dim))
        if config.cond_dim:
            self.cond_encoder = nn.Conv3d(config.cond_dim, dim, (1, 2, 2), (1, 2, 2))
        if config.enable_framepack:
            self.frame_packer = FramePacker(config.in_dim, dim)
        self.casual_audio_encoder = CausalAudioEncoder(
            config.audio_dim, dim, config.audio_layers, config.num_audio_token
        )
        self.audio_injector = AudioInjector(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.injector_of_block = {block: j for j, block in enumerate(config.audio_inject_layers)}
        self.float8_cache = False
        self.joined: list[nn.Module] = []
        """Matrices that share their weights with those of the blocks, one for each, where there are any."""
        self.enter: Enter | None = None
        """Told of each layer that a step is about to enter; for what has to be there by then (`avatar.offload`)."""
        self.adopt: Callable[[KVCache], None] = lambda cache: None
        """Given each cache before steps that use it; brings its rings where they live now (`avatar.offload`)."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the residual stream between blocks, and of keys and values."""
        return self.patch_embedding.weight.dtype

    def initialize(self) -> None:
        """Draw weights to begin training with, from torch's global generator; velocity and injections begin at zero.

        Source: Wan2.1, WanModel.init_weights; Wan2.2-S2V, zero_init.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        embeddings = [self.time_embedding[0], self.time_embedding[2], self.trainable_cond_mask]
        if self.config.text_dim:
            embeddings += [self.text_embedding[0], self.text_embedding[2]]
        for module in embeddings:
            nn.init.normal_(module.weight, std=0.02)
        for module in [self.head.head, *(injector.o for injector in self.audio_injector.injector)]:
            nn.init.zeros_(module.weight)
        if self.config.cond_dim:
            nn.init.zeros_(self.cond_encoder.weight)

    # What goes in.

    def embed(self, x: Tensor, pose: Tensor | None = None) -> Tensor:
        """Noisy latents x [B, c, F, h, w] and pose latents, shaped alike or None (zero) -> tokens [B, F * n, D]."""
        tokens = patches(x, self.patch_embedding)
        if self.config.cond_dim:
            # The pose convolution of zeros is its bias.
            tokens = tokens + (self.cond_encoder.bias if pose is None else patches(pose, self.cond_encoder))
        return tokens + self.trainable_cond_mask.weight[0]

    def reference_tokens(self, latent: Tensor) -> Tensor:
        """The reference frame's latent [B, c, 1, h, w] -> tokens [B, n, D]."""
        return patches(latent, self.patch_embedding) + self.trainable_cond_mask.weight[1]

    def motion_tokens(self, motion: Tensor) -> Tensor:
        """Motion latents [B, c, M, h, w], oldest first -> tokens [B, about 1.5 n, D]."""
        return self.frame_packer(motion) + self.trainable_cond_mask.weight[2]

    def modulation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps t [B] (0..1000) -> e [B, D] for the head and e0 [B, 6, D] for the blocks, float32.

        A pure function of t, and 300 MB of weights at full size: call it once for each distinct timestep.
        """
        half = self.config.freq_dim // 2
        frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
        angles = t.double()[:, None] * frequencies
        wave = torch.cat([angles.cos(), angles.sin()], dim=1).float()
        e = linear_float32(self.time_embedding[2], F.silu(linear_float32(self.time_embedding[0], wave)))
        e0 = linear_float32(self.time_projection[1], F.silu(e)).unflatten(1, (6, -1))
        return e, e0

    def encode_text(self, features: Tensor) -> TextKV:
        """Features of the prompt [B, len <= text_len, text_dim] -> its keys and values in every block.

        The prompt is padded with zeros to text_len; the padding is attended like the rest, as it was in training. All
        of it is the same, so one token of it is kept.
        """
        if not self.config.text_dim:
            return []
        missing = self.config.text_len - features.shape[1]
        text = self.text_embedding(F.pad(features.to(self.dtype), (0, 0, 0, min(missing, 1))))
        made = (block.cross_attn.keys_values(text) for block in self.blocks)
        return [Text(k, v, max(missing, 1)) for k, v in made]

    def encode_audio(self, features: Tensor) -> AudioTokens:
        """Speech features of one block [A, layers, channels, video frames] -> tokens of its latent frames.

        Call it once per block: the same for all steps. Blocks know nothing of the audio before them; the first frame
        stands for the past. A is the batch: sessions, actors, or the blocks of a training sequence.
        """
        # One copy puts the strided convolutions in the phase that the reference has after 73 copies.
        features = torch.cat([features[..., :1], features], dim=-1)
        global_, local = self.casual_audio_encoder(features)
        return AudioTokens(global_[:, 1:].to(self.dtype), local[:, 1:].to(self.dtype))

    def prepare_audio(self, tokens: AudioTokens) -> list[Injection | AudioTokens]:
        """What each injector makes of the block's audio, once per block, for `step`."""
        return [self.audio_injector.prepare(j, tokens) for j in range(len(self.config.audio_inject_layers))]

    def hear(self, features: Tensor) -> list[Injection | AudioTokens]:
        """`encode_audio`, then `prepare_audio`: all that a block's audio is to `step`."""
        return self.prepare_audio(self.encode_audio(features))

    def hear_later(self, features: Tensor) -> list[Injection | AudioTokens]:
        """As `hear`, but each injector prepares its part when its turn comes first: when its weights are there."""
        return [self.encode_audio(features)] * len(self.config.audio_inject_layers)

    # Where tokens are.

    def block_rope(self, f0: int, frames: int, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
        """Rotations [frames * rows * columns, dim / 2, 2] of the tokens of latent frames f0, f0 + 1, ..."""
        return rope_table(range(f0, f0 + frames), range(rows), range(columns), self.config.head_dim, device)

    def reference_rope(self, conditioning: Conditioning, position: int) -> Tensor:
        """Rotations [n, dim / 2, 2] of the reference frame's tokens at that frame position."""
        return self.block_rope(position, 1, conditioning.rows, conditioning.columns, conditioning.keys[0].device)

    def conditioning_rope(
        self, reference_position: int, rows: int, columns: int, device: torch.device | None = None
    ) -> Tensor:
        """Rotations [C, dim / 2, 2]: the reference frame, then the motion groups near, mid, far at negative frames."""
        head_dim = self.config.head_dim
        tables = [rope_table([reference_position], range(rows), range(columns), head_dim, device)]
        if self.config.enable_framepack:
            for start, extent, count, ratio in ((-1, 1, 1, 1), (-3, 2, 1, 2), (-19, 16, 4, 4)):
                frame_positions = sampled_positions(start, extent, count)
                row_positions = sampled_positions(0, rows, rows // ratio)
                column_positions = sampled_positions(0, columns, columns // ratio)
                tables.append(rope_table(frame_positions, row_positions, column_positions, head_dim, device))
        return torch.cat(tables)

    # The two passes.

    def prefill(self, reference: Tensor, motion: Tensor | None, text: TextKV) -> Conditioning:
        """Run the conditioning tokens alone through all blocks, at timestep 0 and without audio; keep keys and values.

        Args:
            reference: [B, c, 1, h, w]; motion: [B, c, M, h, w], needed if and only if the frame packer is on.
        """
        rows, columns = reference.shape[-2] // 2, reference.shape[-1] // 2
        x = self.reference_tokens(reference)
        if self.config.enable_framepack:
            if motion is None:
                raise ValueError("motion latents are missing; this model packs motion frames")
            x = torch.cat([x, self.motion_tokens(motion)], dim=1)
        _, e0 = self.modulation(torch.zeros(1, device=x.device))
        rope = self.conditioning_rope(PREFILL_POSITION, rows, columns, x.device)
        kept = Conditioning([], [], [], rows, columns)
        n = kept.tokens_per_frame

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            turned = apply_rope(k, rope)
            kept.keys.append(k[:, :n].clone())
            kept.motion_keys.append(stored(turned[:, n:], self.float8_cache))
            kept.values.append(stored(v, self.float8_cache))
            if len(kept.keys) == len(self.blocks):
                return None
            return attention(apply_rope(q, rope), turned, v)

        for i, block in enumerate(self.blocks):
            x = block(x, e0, attend, text[i] if text else None)
        return kept

    def new_cache(self, conditioning: Conditioning, ring_frames: int) -> KVCache:
        """An empty ring of `ring_frames` latent frames behind that conditioning; one for each denoising step."""
        cache = KVCache.empty(conditioning, ring_frames, self.float8_cache)
        self.condition(cache, conditioning)
        return cache

    def condition(self, cache: KVCache, conditioning: Conditioning) -> None:
        """Give a cache new conditioning of the same size, in place; its ring stays (re-anchoring)."""
        cache.condition(conditioning, self.reference_rope(conditioning, PREFILL_POSITION), PREFILL_POSITION)

    def step(self, *arguments: Any, **options: Any) -> Tensor:
        """As `step_by_layer`, all layers at once."""
        (velocity,) = in_lockstep([self.step_by_layer(*arguments, **options)], self.enter)
        return velocity

    def step_by_layer(
        self,
        x: Tensor,
        time: tuple[Tensor, Tensor],
        conditioning: Conditioning,
        text: TextKV,
        audio: list[Injection | AudioTokens],
        cache: KVCache,
        f0: int,
        reference_position: int,
        pose: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Pass:
        """The velocity of one block at one noise level.

        Args:
            x: noisy latents [B, c, F, h, w]; pose: the same shape, or None.
            time: modulation(t), of one timestep for all or one for each session.
            conditioning, text, audio: from prefill, encode_text, prepare_audio(encode_audio(features)).
            cache: the memory of this denoising step; the block's keys and values are written into it, in place.
            f0: index of the block's first latent frame since the stream began.
            reference_position: frame position of the reference for this call.
            mask: which actor drives which token, [A, >= F, rows, columns, 1]; audio then holds A * B rows.
        Returns: velocity [B, out_dim, F, h, w] of the type `dtype`.
        """
        frames, rows, columns = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        e, e0 = time
        x = self.embed(x, pose)
        rope = self.block_rope(f0, frames, rows, columns, x.device)
        if cache.reference_position != reference_position:
            moved = self.reference_rope(conditioning, reference_position)
            cache.move_reference(conditioning, moved, reference_position)
        start = f0 * rows * columns
        turn = self.turn(cache, conditioning, start, x.shape[1])

        for i in range(len(self.blocks)):
            turn.layer = i
            yield turn

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = i) -> Tensor:
                return attention(q, *cache.append(layer, k, v, start))

            x = self.blocks[i](x, e0, attend, text[i] if text else None, rope)
            if i in self.injector_of_block:
                j = self.injector_of_block[i]
                x = self.add_audio(j, x, self.injection(audio, j), mask)
        return self.head(x, e, rows, columns)

    def modules_of_layer(self, i: int) -> list[nn.Module]:
        """All whose weights are needed while a step is in that layer, and at no other time."""
        modules: list[nn.Module] = [self.blocks[i], *self.joined[i : i + 1]]
        if i in self.injector_of_block:
            j = self.injector_of_block[i]
            modules += [self.audio_injector.injector[j], self.audio_injector.injector_adain_layers[j]]
        return modules

    def turn(self, cache: KVCache, conditioning: Conditioning, start: int, tokens: int) -> Turn:
        """A pass before its first layer, its cache's reference in place."""
        table = None
        if cache.away:
            assert cache.reference_position is not None
            table = self.reference_rope(conditioning, cache.reference_position)
        return Turn(0, cache, conditioning, table, start, tokens)

    def injection(self, audio: list[Injection | AudioTokens], j: int) -> Injection:
        """What injector j makes of the audio; where that is not prepared yet it is now, in place."""
        prepared = audio[j]
        if isinstance(prepared, AudioTokens):
            prepared = audio[j] = self.audio_injector.prepare(j, prepared)
        return prepared

    def inject(self, j: int, x: Tensor, tokens: AudioTokens, mask: Tensor | None = None) -> Tensor:
        """Let injector j add the audio to x [B, F * n, D]; tokens: global [B, F, 1, D], local [B, F, 5, D]."""
        return self.add_audio(j, x, self.audio_injector.prepare(j, tokens), mask)

    def add_audio(self, j: int, x: Tensor, injection: Injection, mask: Tensor | None = None) -> Tensor:
        """As `inject`, from what `prepare_audio` made."""
        batch, (rows, frames) = x.shape[0], injection.shift.shape[:2]
        actors = rows // batch
        if mask is None:
            if rows != batch:
                raise ValueError(f"audio of {rows} actors for a batch of {batch}; several actors need a mask")
            return x + self.audio_injector(j, x, injection).flatten(1, 2)
        # The mask's first frames serve every block, as in the reference.
        where = rearrange(mask[:, :frames].to(x.dtype), "a f row col 1 -> a 1 f (row col) 1")
        added = self.audio_injector(j, x.repeat(actors, 1, 1), injection).unflatten(0, (actors, batch))
        return x + (added * where).sum(dim=0).flatten(1, 2)


def patches(x: Tensor, layer: nn.Conv3d) -> Tensor:
    """A convolution whose stride is its kernel, as the matrix product it is: [B, c, F, h, w] -> tokens [B, N, D]."""
    pf, ph, pw = layer.kernel_size
    x = rearrange(
        x.to(layer.weight.dtype), "b c (f pf) (row ph) (col pw) -> b (f row col) (c pf ph pw)", pf=pf, ph=ph, pw=pw
    )
    return F.linear(x, layer.weight.flatten(1), layer.bias)


def linear_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), layer.bias.float())
