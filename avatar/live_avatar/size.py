"""What follows from the picture's size: which size a source picture leads to, and what the networks then ask for.

Everything here is arithmetic on the shapes of the full-size networks; tests hold it equal to the networks themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from audio.errors import AvatardError
from avatar.demand import Demand, Network, Rings, When, Work

MULTIPLE = 64
"""Both sides: 8 for the VAE, 2 for the patches, 4 for the coarsest motion tokens."""


class SizeError(AvatardError):
    """No picture size fits."""


def fit_size(height: int, width: int, area: int) -> tuple[int, int]:
    """Height and width in multiples of 64, of about the picture's proportions, at most `area` pixels together.

    A small picture may grow to the next multiple.
    Args: height, width: of the source picture, in pixels; area: in pixels, such as 704 * 384.
    Raises: SizeError: the area holds no 64 x 64 square of these proportions.
    """
    if height < 1 or width < 1:
        raise SizeError(f"picture of {width}x{height} pixels: both sides must be at least 1")
    pixels = height * width
    if pixels <= area:
        largest, smallest = 1.0, 0.1
    else:
        # At the smallest scale even rounding both sides up keeps within the area.
        largest = math.sqrt(area / pixels)
        b = (MULTIPLE - 1) * (height + width)
        c = (MULTIPLE - 1) ** 2 - area
        smallest = (-b + math.sqrt(b * b - 4 * pixels * c)) / (2 * pixels)
    for i in range(100):
        scale = largest - (largest - smallest) * i / 100
        h, w = (math.ceil(int(side * scale) / MULTIPLE) * MULTIPLE for side in (height, width))
        if 0 < h * w <= area:
            return h, w
    h = int(math.sqrt(area * height / width)) // MULTIPLE * MULTIPLE
    w = int(math.sqrt(area * width / height)) // MULTIPLE * MULTIPLE
    if h >= height or w >= width:
        h, w = height // MULTIPLE * MULTIPLE, width // MULTIPLE * MULTIPLE
    if h * w == 0:
        raise SizeError(f"an area of {area} pixels is too small for a picture of {width}x{height}; 4096 is the least")
    return h, w


# ---------------------------------------------------------------------------------------------------------------------
# What the networks ask for. Widths and counts are those of `DiTConfig`, umT5-xxl, wav2vec2-large and the Wan 2.1 VAE.

DIM, FFN, LAYERS, HEAD_DIM = 5120, 13824, 40, 128
INJECTED = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
TEXT_TOKENS, AUDIO_TOKENS = 512, 5
LATENTS_PER_BLOCK, MOTION_LATENTS = 3, 19
SPEECH_FEATURES = 25 * 1024 * 12

EMBEDDING_PARAMETERS = 352_055_129
"""Of the transformer without blocks and injectors: time, text, audio encoder, patches, motion, head."""
TEXT_LAYERS, TEXT_LAYER_PARAMETERS, TEXT_PARAMETERS = 24, 192_948_224, 5_680_910_336
SPEECH_PARAMETERS = 315_437_696
ENCODER_PARAMETERS, DECODER_PARAMETERS = 53_596_928, 73_295_603

TRAFFIC_PER_CHANNEL = 68
"""Bytes read and written between the products of one block for each token and channel, its stages compiled: the norms,
modulations, gates, rotations, GELU and roundings of `Block` counted one by one; not measured."""

STEP_BYTES_PER_TOKEN = 106_540
"""Activations of a step at their most, found by running `CausalDiT.step` on the meta device."""
WAITING_BYTES_PER_TOKEN = 4 * DIM
"""Of those, the stream and its norm, which a pass keeps from layer to layer."""
DECODE_BYTES_PER_PIXEL, DECODE_ONE_BYTES_PER_PIXEL = 28_200, 11_000
"""What the decoder may work in, for each pixel of the picture, with a whole block at once and with one latent at a
time. On an H200 at 704x384 it took 4.7 GiB and 2.07, and 7.1 and 2.6 to 3.0 with what the allocator kept; more makes
cuDNN's convolutions no faster."""
ENCODE_BYTES_PER_PIXEL = 14_200
"""What the beginning of a stream works in, the most while the decoder is primed: 3.25 GiB on an H200 at 704x384, 3.57
with what the allocator kept, and 1.2 of it stay as the stream's memory. The encoder's activations and memory are 8,610,
found in the same way."""
SPEECH_BYTES = 300_000_000
"""wav2vec2's activations for a window of 8.4 s: 25 states of 418 frames and the first convolutions' outputs;
estimated."""

SPEECH_WINDOW_FRAMES = 418
"""Of 20 ms: what `SpeechStream` hears for each block, with the past and the look-ahead."""


@dataclass(frozen=True)
class Shape:
    """The stream that is wanted, as far as bytes and operations depend on it.

    Raises: SizeError: a size that the networks cannot make.
    """

    width: int = 704
    height: int = 384
    steps: int = 4
    merge_last_step: bool = False
    ring_blocks: int = 4

    def __post_init__(self) -> None:
        if min(self.width, self.height) < MULTIPLE or self.width % MULTIPLE or self.height % MULTIPLE:
            width, height = (max(1, round(side / MULTIPLE)) * MULTIPLE for side in (self.width, self.height))
            raise SizeError(
                f"size {self.width}x{self.height}: both sides must be multiples of {MULTIPLE}; "
                f"the nearest is {width}x{height}"
            )
        if not 1 <= self.steps <= 8 or self.passes < 1:
            raise SizeError(f"steps: {self.steps}{', merged' * self.merge_last_step}; must be 1 to 8, merged 2 to 8")

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.steps} steps{', the last merged' * self.merge_last_step}"

    @property
    def passes(self) -> int:
        """Forward passes for a block, each with its ring."""
        return self.steps - self.merge_last_step

    @property
    def tokens(self) -> int:
        """Of one latent frame."""
        return self.width * self.height // 256

    @property
    def queries(self) -> int:
        """Tokens of a block."""
        return LATENTS_PER_BLOCK * self.tokens

    @property
    def conditioning(self) -> int:
        """Conditioning tokens: the reference, and motion at three compressions."""
        rows, columns = self.height // 16, self.width // 16
        return 2 * self.tokens + (rows // 2) * (columns // 2) + 4 * (rows // 4) * (columns // 4)

    @property
    def keys(self) -> int:
        """What a query looks at, once the ring is full."""
        return self.ring_blocks * self.queries + self.conditioning

    def lesser(self) -> Iterator[Shape]:
        """Shapes that ask for less, the least missed first: a merged last step, then smaller pictures."""
        area = self.width * self.height
        smaller = [size for size in SIZES if size[0] * size[1] < area]
        if self.height > self.width:
            smaller = [(height, width) for width, height in smaller]
        merging = [False, True] if self.steps > 1 and not self.merge_last_step else [self.merge_last_step]
        for width, height in [(self.width, self.height), *smaller]:
            for merged in merging:
                shape = replace(self, width=width, height=height, merge_last_step=merged)
                if shape != self:
                    yield shape

    def demand(self) -> Demand:
        """All parts of the full-size model, in the order of their use."""
        pixels = self.width * self.height
        kv_bytes = 2 * 2 * DIM
        return (
            Network(
                "text encoder",
                When.START,
                2 * TEXT_PARAMETERS,
                layers=(2 * TEXT_LAYER_PARAMETERS,) * TEXT_LAYERS,
                workspace_bytes=200_000_000,
            ),
            Network(
                "VAE encoder",
                When.START,
                2 * ENCODER_PARAMETERS,
                workspace_bytes=ENCODE_BYTES_PER_PIXEL * pixels,
                session_bytes=2 * 3 * pixels,
            ),
            Network(
                "speech encoder",
                When.BLOCK,
                2 * SPEECH_PARAMETERS,
                work=Work(matrices=2.0 * SPEECH_PARAMETERS * SPEECH_WINDOW_FRAMES, launches=800),
                workspace_bytes=SPEECH_BYTES,
            ),
            Network("embeddings", When.STEP, 2 * EMBEDDING_PARAMETERS, work=Work(matrices=1.25e10, launches=25)),
            self._transformer(kv_bytes),
            Rings(
                LAYERS,
                self.passes,
                self.ring_blocks,
                ring_bytes=self.ring_blocks * self.queries * kv_bytes,
                conditioning_bytes=self.conditioning * kv_bytes,
                reference_bytes=self.tokens * kv_bytes // 2,
            ),
            Network(
                "VAE decoder",
                When.BLOCK,
                2 * DECODER_PARAMETERS,
                work=Work(convolutions=LATENTS_PER_BLOCK * decoder_operations(self.width, self.height), launches=400),
                workspace_bytes=DECODE_BYTES_PER_PIXEL * pixels,
                least_workspace_bytes=DECODE_ONE_BYTES_PER_PIXEL * pixels,
                session_bytes=decoder_memory_bytes(self.width, self.height),
            ),
        )

    def _transformer(self, kv_bytes: int) -> Network:
        queries = self.queries
        block = 12 * DIM**2 + 4 * DIM * FFN
        attended = LAYERS * (self.keys + TEXT_TOKENS) + len(INJECTED) * AUDIO_TOKENS
        exact = [block_bytes(layer in INJECTED) for layer in range(LAYERS)]
        float8 = [block_float8_bytes(layer in INJECTED) for layer in range(LAYERS)]
        return Network(
            "transformer",
            When.STEP,
            sum(exact),
            sum(float8),
            tuple(exact),
            tuple(float8),
            Work(
                matrices=float(queries * (LAYERS * block + len(INJECTED) * 4 * DIM**2)),
                attention=4.0 * queries * DIM * attended,
                traffic=float(TRAFFIC_PER_CHANNEL * DIM * queries * LAYERS),
                launches=25 * LAYERS,
            ),
            workspace_bytes=STEP_BYTES_PER_TOKEN * queries,
            waiting_bytes=WAITING_BYTES_PER_TOKEN * queries,
            session_bytes=LAYERS * TEXT_TOKENS * kv_bytes + self._kept_bytes(),
        )

    def _kept_bytes(self) -> int:
        """Latents of motion, noise, anchor and of the last blocks with their speech: see `Session`."""
        latent = 16 * self.width * self.height // 64
        made = self.passes * LATENTS_PER_BLOCK * latent + SPEECH_FEATURES
        return 4 * MOTION_LATENTS * latent + 2 * (13 * latent + (self.ring_blocks + 2) * made)


SIZES = ((704, 384), (640, 384), (576, 320), (448, 256), (384, 192), (256, 128))
"""Sizes of about 16:9 that a plan falls back to."""


def block_bytes(injected: bool) -> int:
    """One transformer block in bfloat16, with the audio injector behind it."""
    block = 8 * DIM**2 + 2 * DIM * FFN + 21 * DIM + FFN
    injector = 6 * DIM**2 + 8 * DIM
    return 2 * (block + injected * injector)


def block_float8_bytes(injected: bool) -> int:
    """The same with its matrices in 8 bits and a float32 scale for each output; the rest stays bfloat16."""
    matrices = 8 * DIM**2 + 2 * DIM * FFN + injected * 6 * DIM**2
    outputs = 9 * DIM + FFN + injected * 6 * DIM
    return matrices + 4 * outputs + (block_bytes(injected) - 2 * matrices)


@dataclass(frozen=True)
class _Convolution:
    """One causal convolution of the decoder: what it reads, at 1 / scale of the picture's sides, `frames` at a time."""

    inputs: int
    outputs: int
    scale: int
    frames: int
    kernel: int = 27
    remembers: bool = True


def _decoder_convolutions() -> Iterator[_Convolution]:
    """Those of AutoencoderKLWan(base_dim=96), in the order of the calls."""

    def residual(inputs: int, outputs: int, scale: int, frames: int) -> Iterator[_Convolution]:
        yield _Convolution(inputs, outputs, scale, frames)
        yield _Convolution(outputs, outputs, scale, frames)
        if inputs != outputs:
            yield _Convolution(inputs, outputs, scale, frames, 1, remembers=False)

    yield _Convolution(16, 16, 8, 1, 1, remembers=False)
    yield _Convolution(16, 384, 8, 1)
    for _ in range(2):
        yield from residual(384, 384, 8, 1)
    yield _Convolution(384, 4 * 384, 8, 1, 1, remembers=False)  # the attention's projections, in and out
    stages = ((384, 384, 2, True), (192, 384, 2, True), (192, 192, 1, True), (96, 96, 1, False))
    scale, frames = 8, 1
    for inputs, width, faster, grows in stages:
        for place in range(3):
            yield from residual(width if place else inputs, width, scale, frames)
        if faster == 2:
            yield _Convolution(width, 2 * width, scale, frames, 3)
        if grows:
            scale, frames = scale // 2, frames * faster
            yield _Convolution(width, width // 2, scale, frames, 9, remembers=False)
    yield _Convolution(96, 3, 1, 4)


def decoder_operations(width: int, height: int) -> float:
    """Of the VAE decoder for one latent frame in the middle of a stream, its attention included."""
    area = width * height
    convolutions = sum(2 * c.kernel * c.inputs * c.outputs * c.frames / c.scale**2 for c in _decoder_convolutions())
    return convolutions * area + 4 * (area / 64) ** 2 * 384


def decoder_memory_bytes(width: int, height: int) -> int:
    """What a running decoder remembers in bfloat16: the last two frames that each causal convolution was given."""
    return sum(2 * 2 * c.inputs * width * height // c.scale**2 for c in _decoder_convolutions() if c.remembers)
