"""The drawn world: presenters of great variety, painted from signed distances, a whole batch at a time.

A picture is painted back to front: each shape is a distance field (negative inside, in units of half the picture's
side), its coverage is the distance through a one-pixel ramp, and paint is laid over what is there. Everything is
elementwise arithmetic on [N, S, S], so on a GPU the whole painter compiles into a few kernels.

The world exists for training and for measuring. Nothing here is imported when a picture speaks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from avatar.pocket.motion import DRIVE, sample_drive
from avatar.pocket.network import SIZE

MOUTH = ("opening", "width", "pucker", "tongue")
"""The mouth's four numbers, about 0..1."""

Person = dict[str, Tensor]
"""Who: each trait a tensor [N], colours [N, 3]."""

Motion = dict[str, Tensor]
"""How they are moved: each name of DRIVE and MOUTH a tensor [N]."""

HAIR_STYLES = ("bald", "short", "parted", "fringe", "long", "afro", "bun", "wavy", "bob", "swept")

_SKIN = (
    (252, 226, 202), (246, 208, 176), (234, 190, 152), (222, 170, 130), (202, 148, 108), (178, 122, 86),
    (150, 98, 68), (122, 78, 54), (94, 60, 44), (240, 196, 148),
)  # fmt: skip
_HAIR = (
    (26, 22, 22), (48, 34, 26), (84, 54, 34), (124, 80, 44), (168, 116, 62), (214, 172, 98), (236, 210, 150),
    (150, 58, 30), (120, 118, 120), (212, 210, 208), (88, 42, 92), (38, 66, 110), (176, 66, 102),
)  # fmt: skip


def _rgb(r: float, g: float, b: float, like: Tensor) -> Tensor:
    return torch.stack([torch.full_like(like, c) for c in (r, g, b)], -1)


def _hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """[N] each, hue in turns, to RGB [N, 3]."""
    k = (torch.tensor([5.0, 3.0, 1.0], device=hue.device) + hue[:, None] * 6) % 6
    ramp = torch.minimum(k, 4 - k).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * ramp)


def sample_person(count: int, generator: torch.Generator) -> Person:
    """Draw people at random; all randomness comes from `generator`, all tensors are on its device."""
    where = generator.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, device=where)

    def choice(n: int) -> Tensor:
        return torch.randint(0, n, (count,), generator=generator, device=where)

    def chance(p: float) -> Tensor:
        return (uniform(0, 1) < p).float()

    def jitter(colour: Tensor, amount: float) -> Tensor:
        return colour + amount * torch.randn(count, 3, generator=generator, device=where)

    skins = torch.tensor(_SKIN, device=where) / 255
    hairs = torch.tensor(_HAIR, device=where) / 255
    mix = uniform(0, 1)[:, None]
    tone = choice(9)
    skin = jitter(skins[tone] * (1 - mix) + skins[(tone + 1) % 10] * mix, 0.02).clamp(0.12, 1.0)
    lip_paint = _hsv(uniform(0.94, 1.03), uniform(0.4, 0.75), uniform(0.5, 0.85))
    made_up = (uniform(0, 1) ** 2)[:, None]
    iris_hue = torch.where(chance(0.5) > 0, uniform(0.04, 0.11), uniform(0.28, 0.62))
    natural = skin * torch.tensor([0.86, 0.56, 0.56], device=where)
    return {
        "skin": skin,
        "hair": jitter(hairs[choice(13)], 0.03).clamp(0.03, 1.0),
        "lips": (natural * (1 - 0.6 * made_up) + lip_paint * 0.6 * made_up).clamp(0.05, 1.0),
        "iris": _hsv(iris_hue, uniform(0.3, 0.8), uniform(0.2, 0.6)),
        "wall_top": _hsv(uniform(0, 1), uniform(0.03, 0.4), uniform(0.4, 0.98)),
        "wall_bottom": _hsv(uniform(0, 1), uniform(0.03, 0.45), uniform(0.3, 0.95)),
        "prop": _hsv(uniform(0, 1), uniform(0.1, 0.6), uniform(0.3, 0.98)),
        "cloth": _hsv(uniform(0, 1), uniform(0.0, 0.8), uniform(0.12, 0.92)),
        "cloth_2": _hsv(uniform(0, 1), uniform(0.0, 0.7), uniform(0.3, 0.98)),
        # framing
        "head_x": uniform(-0.06, 0.06),
        "head_y": uniform(-0.14, -0.02),
        "head_scale": uniform(1.02, 1.30),
        # the face, in head units
        "face_w": uniform(0.335, 0.415),
        "face_h": uniform(0.44, 0.525),
        "jaw": uniform(0.05, 0.32),
        "eye_x": uniform(0.135, 0.18),
        "eye_y": uniform(-0.10, -0.03),
        "eye_r": uniform(0.060, 0.085),
        "eye_tall": uniform(0.72, 1.08),
        "iris_r": uniform(0.52, 0.66),
        "brow_thick": uniform(0.010, 0.024),
        "brow_long": uniform(0.058, 0.085),
        "brow_y": uniform(-0.145, -0.105),
        "brow_tilt": uniform(-0.22, 0.22),
        "nose_long": uniform(0.05, 0.10),
        "nose_wide": uniform(0.022, 0.045),
        "nose_kind": choice(3).float(),
        "mouth_y": uniform(0.225, 0.28),
        "mouth_w": uniform(0.125, 0.165),
        "lip_thick": uniform(0.010, 0.021),
        "smile": uniform(0.0, 0.042),
        "mouth_gain": uniform(0.10, 0.13),
        "blush": uniform(0, 0.32),
        "shade": uniform(0.0, 0.3),
        "ear": uniform(0.05, 0.085),
        "neck": uniform(0.13, 0.175),
        # hair and what is worn
        "style": choice(len(HAIR_STYLES)).float(),
        "hairline": uniform(-0.27, -0.17),
        "parting": uniform(-0.35, 0.35),
        "volume": uniform(0.02, 0.09),
        "curl": uniform(0, 1),
        "length": uniform(0.15, 0.75),
        "glasses": chance(0.25),
        "frame_dark": uniform(0.05, 0.4),
        "beard": chance(0.16),
        "moustache": chance(0.10),
        "shoulders": uniform(0.70, 1.0),
        "chest_y": uniform(0.68, 0.82),
        "collar": choice(5).float(),
        "stripes": chance(0.22),
        "stripe_pitch": uniform(10, 24),
        # the room
        "room": choice(6).float(),
        "prop_x": uniform(-0.8, 0.8),
        "prop_y": uniform(-0.8, 0.2),
        "prop_r": uniform(0.2, 0.55),
    }


def _ellipse(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Distance to an ellipse, first order: exact on the outline and close to it beside."""
    k = torch.sqrt((x / a) ** 2 + (y / b) ** 2 + 1e-8)
    slope = torch.sqrt((x / (a * a)) ** 2 + (y / (b * b)) ** 2 + 1e-8)
    return k * (k - 1) / slope


def _capsule(x: Tensor, y: Tensor, ax: Tensor, ay: Tensor, bx: Tensor, by: Tensor, r: Tensor | float) -> Tensor:
    dx, dy = bx - ax, by - ay
    along = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-8)).clamp(0, 1)
    return torch.sqrt((x - ax - dx * along) ** 2 + (y - ay - dy * along) ** 2 + 1e-9) - r


def _box(x: Tensor, y: Tensor, half_w: Tensor | float, half_h: Tensor | float, corner: Tensor | float) -> Tensor:
    qx, qy = x.abs() - half_w + corner, y.abs() - half_h + corner
    outside = torch.sqrt(qx.clamp_min(0) ** 2 + qy.clamp_min(0) ** 2 + 1e-9)
    return outside + torch.maximum(qx, qy).clamp_max(0) - corner


def _both(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a, b)


def _either(a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(a, b)


class _Painter:
    """One batch of pictures while they are painted, back to front; each method lays a part over `image`, in place.

    sx, sy: coordinates of the picture, -1..1; x, y: of the head, its face's centre at the origin, turned about the
    chin; fx, fy: where the features have turned to. Distances of the head are in its own units, `scale` of the
    picture's.
    """

    def __init__(self, person: Person, motion: Motion, size: int) -> None:
        self.person, self.motion = person, motion
        like = person["head_x"]
        self.pixel = 2.0 / size
        grid = (torch.arange(size, device=like.device, dtype=torch.float32) + 0.5) * self.pixel - 1
        self.sy, self.sx = grid[None, :, None], grid[None, None, :]
        p, m = self.p, self.m
        self.nothing = torch.ones_like(self.sx + self.sy + p("head_x"))
        self.skin, self.hair = self.paint("skin"), self.paint("hair")
        self.image = torch.empty(0)

        self.scale = p("head_scale") * (1 + m("zoom"))
        self.head_x, self.head_y = p("head_x") + m("tx"), p("head_y") + m("ty")
        cos, sin = torch.cos(m("roll")), torch.sin(m("roll"))
        ox, oy = self.sx - self.head_x, self.sy - (self.head_y + 0.45 * self.scale)
        self.x = (cos * ox + sin * oy) / self.scale
        self.y = (cos * oy - sin * ox) / self.scale + 0.45
        self.yaw, self.pitch = m("yaw"), m("pitch")
        self.fx, self.fy = self.x - 0.085 * self.yaw, self.y - 0.07 * self.pitch
        self.xj = (self.x - 0.02 * self.yaw) / (1 - p("jaw") * self.y * 0.9)
        self.head = _ellipse(self.xj, self.y, p("face_w"), p("face_h")) * (1 - 0.3 * p("jaw"))
        self.face = self.cover(self.head * self.scale)

    # Words of the painter.

    def p(self, name: str) -> Tensor:
        """A trait of the person, [N, 1, 1]."""
        return self.person[name][:, None, None]

    def m(self, name: str) -> Tensor:
        """A number of the motion, [N, 1, 1]."""
        return self.motion[name][:, None, None]

    def paint(self, name: str, gain: float = 1.0) -> Tensor:
        """A colour of the person, [N, 3, 1, 1]."""
        return (self.person[name] * gain)[:, :, None, None]

    def flat(self, r: float, g: float, b: float) -> Tensor:
        """A colour that all have."""
        return _rgb(r, g, b, self.person["head_x"])[:, :, None, None]

    def cover(self, distance: Tensor) -> Tensor:
        """How much of each pixel lies inside, 0..1; distance in units of the picture."""
        return (0.5 - distance / (1.25 * self.pixel)).clamp(0, 1)

    def over(self, alpha: Tensor, colour: Tensor) -> None:
        """Lay a colour over the picture."""
        self.image = self.image + alpha[:, None] * (colour - self.image)

    def style(self, *names: str) -> Tensor:
        """Who has one of these hair styles, [N, 1, 1]."""
        found = torch.zeros_like(self.p("style"), dtype=torch.bool)
        for name in names:
            found = found | (self.p("style") == HAIR_STYLES.index(name))
        return found

    # The parts.

    def room(self) -> None:
        p, nothing, sx, sy = self.p, self.nothing, self.sx, self.sy
        height = (sy + 1) * 0.5 + 0 * nothing
        top, bottom = self.paint("wall_top"), self.paint("wall_bottom")
        self.image = top + (bottom - top) * height[:, None]
        rx, ry, rr, room = sx - p("prop_x"), sy - p("prop_y"), p("prop_r"), p("room")
        disc = torch.sqrt(rx**2 + ry**2 + 1e-9) - rr
        window = _both(_box(rx, ry, rr * 0.8, rr, 0.03), 0.02 - _either(rx.abs(), ry.abs()))
        stripes = torch.sin(sx * 8 + p("prop_x") * 9).abs() * 0.2 - 0.05 + 0 * nothing
        floor = 0.35 - sy + 0 * nothing
        boards = (((sy + 0.9 + p("prop_r")) % 0.5) - 0.25).abs() - 0.02 + 0 * nothing
        shelf = _either(boards, _box(rx, ry, 0.05, 2.0, 0.01))
        prop = torch.where(room == 0, disc, torch.where(room == 1, window, torch.where(room == 2, stripes, nothing)))
        prop = torch.where(room == 3, floor, torch.where(room == 4, shelf, prop))
        self.over(self.cover(prop) * 0.55, self.paint("prop"))

    def hair_behind(self) -> None:
        p, x, y, nothing = self.p, self.x, self.y, self.nothing
        fw, fh, volume, length = p("face_w"), p("face_h"), p("volume"), p("length")
        wave = torch.sin(torch.atan2(x, 0.05 - y) * (14 + 6 * p("curl"))) * 0.018
        strand = torch.sin(y * (16 + 10 * p("curl"))) * 0.016
        xb = x + 0.03 * self.yaw
        long_hair = _box(xb, y - (length * 0.5 - 0.05), fw + volume + 0.02, length * 0.5 + 0.42, 0.30)
        bob = _box(xb, y - 0.06, fw + volume + 0.03, 0.40, 0.24)
        afro = torch.sqrt(xb**2 + (y + 0.12) ** 2 + 1e-9) - (fw + 0.12 + volume) + wave
        bun = _either(
            torch.sqrt((x + 0.05 * self.yaw) ** 2 + (y + fh + 0.10) ** 2 + 1e-9) - 0.15,
            _both(_ellipse(x, y, fw + volume * 0.4, fh + volume * 0.4), y - 0.05),
        )
        behind = torch.where(self.style("long"), long_hair, nothing)
        behind = torch.where(self.style("wavy"), long_hair + strand, behind)
        behind = torch.where(self.style("bob"), bob, behind)
        behind = torch.where(self.style("afro"), afro, behind)
        behind = torch.where(self.style("bun"), bun, behind)
        self.over(self.cover(behind * self.scale), self.hair * 0.76)

    def body(self) -> None:
        """Shoulders, clothes, neck."""
        p, m, nothing, cover, over, skin = self.p, self.m, self.nothing, self.cover, self.over, self.skin
        bx, by = self.sx - p("head_x") - 0.35 * m("tx"), self.sy - p("chest_y") - m("bob")
        body = _ellipse(bx, by - 0.42, p("shoulders"), 0.50) + 0 * nothing
        striped = ((torch.sin(by * p("stripe_pitch")) > 0) & (p("stripes") > 0.5)).float() + 0 * nothing
        cloth = self.paint("cloth") + (self.paint("cloth_2") - self.paint("cloth")) * striped[:, None]
        cloth = cloth * (1 - 0.18 * (by + 0.1).clamp(0, 0.6))[:, None]
        over(cover(body), cloth)
        collar = p("collar")
        vee = _both((bx.abs() + (by - 0.16) * 0.75) * 0.8, -(by + 0.30))
        round_neck = _ellipse(bx, by + 0.06, 0.25, 0.17)
        opening = torch.where((collar == 1) | (collar == 3), vee, round_neck) + 0 * nothing
        trimmed = ((collar >= 2) & (collar < 4)).float()
        over(cover(_both(opening - 0.035, body)) * trimmed, self.paint("cloth_2"))
        over(cover(_both(body, opening)), skin * 0.93)
        lapel = _both(_both((bx.abs() - 0.10 - (by + 0.12) * 0.55).abs() - 0.055, body), -(by + 0.16))
        over(cover(lapel) * (collar == 4), self.paint("cloth", 0.72))
        neck_x = self.head_x * 0.55 + p("head_x") * 0.45
        neck = _capsule(
            self.sx, self.sy, neck_x, self.head_y + 0.30 * self.scale, p("head_x") + 0.35 * m("tx"),
            p("chest_y") + m("bob") - 0.02, p("neck") * self.scale * 0.92,
        )  # fmt: skip
        over(cover(neck) * (by < 0.06), skin * 0.90)
        under_chin = _ellipse(self.x, self.y - 0.06, p("face_w") * 0.95, p("face_h"))
        over(cover(_both(neck, under_chin)) * 0.5, skin * 0.70)

    def bare_head(self) -> None:
        """Ears, face, and the light on it."""
        p, x, fx, fy = self.p, self.x, self.fx, self.fy
        cover, over, face, skin, scale = self.cover, self.over, self.face, self.skin, self.scale
        ear, ex = p("ear"), p("face_w") + 0.005
        ears = _either(
            _ellipse(x - ex + 0.03 * self.yaw, self.y - 0.02, ear * 0.75, ear * 1.2),
            _ellipse(x + ex + 0.03 * self.yaw, self.y - 0.02, ear * 0.75, ear * 1.2),
        )
        over(cover(ears * scale), skin * 0.92)
        over(cover((ears + 0.022) * scale) * 0.45, skin * 0.72)
        over(face, skin)
        side = ((x - 0.10 * self.yaw) / p("face_w") + 0.1).clamp(0, 1)
        over(face * p("shade") * side**3, skin * 0.6)
        glow = torch.exp(-(((fx + 0.08) / 0.22) ** 2 + ((fy + 0.2) / 0.16) ** 2))
        over(face * 0.10 * glow, self.flat(1.0, 1.0, 0.96))
        for s in (-1, 1):
            cheek = torch.exp(-((fx - s * 0.20) ** 2 + ((fy - 0.13) * 1.2) ** 2) / 0.085**2)
            over(face * p("blush") * cheek, skin * self.flat(1.0, 0.62, 0.62))

    def beard(self) -> None:
        p, fx, fy = self.p, self.fx, self.fy
        mouth_y = p("mouth_y")
        beard = _both(self.head, -(fy - mouth_y + 0.05 + 0.9 * (fx.abs() - 0.17).clamp_min(0)))
        beard = _both(beard, -_ellipse(fx, fy - mouth_y + 0.02, p("mouth_w") * 1.15, 0.05))
        self.over(self.cover(beard * self.scale) * p("beard"), self.hair * 0.88)

    def nose(self) -> None:
        p, fy = self.p, self.fy
        wide, long, kind = p("nose_wide"), p("nose_long"), p("nose_kind")
        nx = self.fx - 0.03 * self.yaw
        button = _ellipse(nx, fy - 0.09, wide, wide * 0.8)
        ridge = _capsule(nx, fy, -0.2 * wide, 0.02 + 0 * long, 0.5 * wide, 0.02 + long, 0.011)
        wings = _both(_ellipse(nx, fy - 0.075, wide * 1.2, wide * 0.9).abs() - 0.008, 0.08 - fy)
        nose = torch.where(kind == 0, button, torch.where(kind == 1, ridge, wings))
        self.over(self.cover(nose * self.scale) * self.face, self.skin * 0.80)

    def eye(self, s: int) -> None:
        """With its brow; s: -1 left, 1 right in the picture."""
        p, m, cover, over, scale = self.p, self.m, self.cover, self.over, self.scale
        blink, eye_r = m("blink"), p("eye_r")
        tall = eye_r * p("eye_tall")
        ex, ey = self.fx - s * p("eye_x"), self.fy - p("eye_y")
        white = _ellipse(ex, ey, eye_r, tall)
        lid = -1.12 * tall + 2.35 * tall * blink - ey + 0.10 * ex * ex / eye_r
        over(cover((white - 0.012) * scale) * self.face, self.skin * 0.90)
        open_eye = cover(_both(white, lid) * scale)
        over(open_eye, self.flat(0.97, 0.97, 0.96))
        ix, iy = ex - m("gaze_x") * eye_r * 0.35, ey - m("gaze_y") * eye_r * 0.30
        from_pupil = torch.sqrt(ix * ix + iy * iy + 1e-9)
        iris_r = eye_r * p("iris_r")
        over(open_eye * cover((from_pupil - iris_r) * scale), self.paint("iris"))
        over(open_eye * cover((from_pupil - iris_r * 0.55) * scale), self.flat(0.05, 0.045, 0.05))
        glint = torch.sqrt((ix + iris_r * 0.3) ** 2 + (iy + iris_r * 0.35) ** 2 + 1e-9) - iris_r * 0.25
        over(open_eye * cover(glint * scale), self.flat(1.0, 1.0, 1.0))
        lash = _both(lid.abs() - 0.008, white - 0.006)
        over(cover(lash * scale) * 0.9, self.hair * 0.25)
        drop = ey - p("brow_y") + 0.045 * m("brow")
        long, tilt = p("brow_long"), p("brow_tilt") * s
        brow = _capsule(ex, drop + 8.0 * ex * ex * 0.35, -long, -long * tilt, long, long * tilt, p("brow_thick"))
        over(cover(brow * scale), self.hair * 0.68)

    def mouth(self) -> None:
        """Lips, and what shows between them; the moustache above."""
        p, m, cover, over, flat, scale = self.p, self.m, self.cover, self.over, self.flat, self.scale
        half = p("mouth_w") * (1 + 0.22 * m("width") - 0.42 * m("pucker"))
        gap = p("mouth_gain") * m("opening")
        mx, my = self.fx, self.fy - p("mouth_y")
        q = (mx / half).clamp(-1.4, 1.4)
        bow = 1 - q * q
        rest = p("smile") * (1 - 0.6 * m("pucker")) * (0.5 - q * q)
        upper = rest - 0.34 * gap * bow
        lower = rest + 0.66 * gap * bow + 0.004
        thick = p("lip_thick") * (1 + 0.7 * m("pucker"))
        steep = torch.sqrt(1 + (1.32 * gap * q / half) ** 2)

        inside = _both(_both(upper - my, my - lower) / steep, mx.abs() - half)
        cupid = 1 - 0.30 * torch.exp(-((q / 0.16) ** 2))
        lips = _both(upper - thick * cupid - my, my - lower - thick * 1.25) / steep
        lips = _both(lips, mx.abs() - half - thick * 0.6)
        lips = _both(lips, _ellipse(mx, my - rest - 0.16 * gap, half + thick * 0.8, 0.6 * gap + thick * 2.2) * 0.9)
        moustache = _ellipse(mx, my + 0.055 + 0.2 * gap, p("mouth_w"), 0.028)
        over(cover(moustache * scale) * p("moustache"), self.hair * 0.85)
        over(cover(lips * scale), self.paint("lips"))
        light = _ellipse(mx, my - lower - thick * 0.55, half * 0.45, thick * 0.35 + 0.002)
        over(cover(light * scale) * 0.35, flat(1.0, 0.86, 0.86))
        hollow = cover((inside + 0.0045) * scale)
        over(hollow, flat(0.29, 0.07, 0.09))
        tongue = _ellipse(mx, my - lower + 0.012 - 0.010 * m("tongue"), half * 0.62, 0.034 + 0.03 * m("tongue"))
        over(hollow * cover(tongue * scale), flat(0.80, 0.37, 0.41))
        teeth = _both(my - (upper + 0.026 + 0.010 * m("width")), mx.abs() - half * 0.82)
        over(hollow * cover(teeth * scale), flat(0.96, 0.95, 0.92))
        over(cover((inside.abs() - 0.0035) * scale) * 0.55, self.paint("lips", 0.45))

    def hair_in_front(self) -> None:
        p, x, y, xj, style = self.p, self.x, self.y, self.xj, self.style
        fw, fh, volume, line, part = p("face_w"), p("face_h"), p("volume"), p("hairline"), p("parting")
        short = line + 0.55 * x * x / fw
        parted = line - 0.10 + 0.35 * (x - part * 0.8).abs()
        fringe = line + 0.10 + 0.012 * torch.sin(x * 70 * (0.4 + p("curl") * 0.6))
        swept = line - 0.03 + 0.28 * (x * torch.sign(part + 1e-3) + 0.15)
        edge = torch.where(style("parted", "long"), parted, torch.where(style("fringe", "bob"), fringe, short))
        edge = torch.where(style("swept"), swept, edge)
        cap = _ellipse(xj, y + 0.01, fw + 0.012 + volume * 0.6, fh + 0.012 + volume)
        cap = _both(cap, y - 0.042 * self.pitch - edge)
        locks = _both(_ellipse(xj, y + 0.01, fw + 0.012 + volume * 0.6, fh + volume), fw * 0.86 - x.abs())
        locks = _both(locks, y - 0.25)
        cap = torch.where(style("long", "wavy", "fringe", "bob"), _either(cap, locks), cap)
        cap = torch.where(style("bald"), self.nothing, cap)
        on_top = self.cover(cap * self.scale)
        self.over(on_top, self.hair)
        strands = torch.sin(x * 46 + 9 * part + 0.8 * torch.sin(y * 19)) > 0.35
        self.over(on_top * 0.16 * strands, self.hair * 0.6)
        shine = torch.exp(-((x - part * 0.5 + 0.1) ** 2 / 0.02 + (y + fh - 0.06) ** 2 / 0.003)) * 0.25
        self.over(on_top * shine, self.flat(1.0, 1.0, 1.0))

    def glasses(self) -> None:
        p, eye_r = self.p, self.p("eye_r")
        rims = self.nothing
        for s in (-1, 1):
            ring = _box(self.fx - s * p("eye_x"), self.fy - p("eye_y"), eye_r * 1.45, eye_r * 1.35, eye_r * 0.7)
            rims = _either(rims, ring.abs() - 0.009)
        between = (p("eye_x") - eye_r * 1.45).clamp_min(0.005)
        rims = _either(rims, _box(self.fx, self.fy - p("eye_y") + 0.01, between, 0.008, 0.004))
        frame = (self.person["frame_dark"][:, None].expand(-1, 3))[:, :, None, None]
        self.over(self.cover(rims * self.scale) * p("glasses"), frame)


def draw(person: Person, motion: Motion, size: int = SIZE) -> Tensor:
    """Paint pictures.

    Args: person and motion with N entries each.
    Returns: [N, 3, size, size] RGB in 0..1.
    """
    painter = _Painter(person, motion, size)
    painter.room()
    painter.hair_behind()
    painter.body()
    painter.bare_head()
    painter.beard()
    painter.nose()
    painter.eye(-1)
    painter.eye(1)
    painter.mouth()
    painter.hair_in_front()
    painter.glasses()
    return painter.image.clamp(0, 1)


def as_motion(drive: Tensor, mouth: Tensor) -> Motion:
    """Drive [..., 11] and mouth [..., 4] as named tensors."""
    named = dict(zip(DRIVE, drive.unbind(-1), strict=True))
    return named | dict(zip(MOUTH, mouth.unbind(-1), strict=True))


def as_frames(person: Person, motion: Motion) -> tuple[Person, Motion]:
    """People [B] and their clips [B, T] as B * T single frames."""
    frames = next(iter(motion.values())).shape[1]
    return (
        {name: trait.repeat_interleave(frames, 0) for name, trait in person.items()},
        {name: value.flatten(0, 1) for name, value in motion.items()},
    )


def reference_motion(count: int, generator: torch.Generator) -> Motion:
    """A pose for a reference picture [B, 1]: any small pose; the mouth mostly closed, sometimes not; eyes open."""
    where = generator.device
    mouth = torch.rand(count, 1, 4, generator=generator, device=where) * 0.9
    quiet = torch.rand(count, 1, 1, generator=generator, device=where) < 0.7
    mouth = torch.where(quiet, mouth * torch.tensor([0.08, 0.3, 0.1, 0.1], device=where), mouth)
    energy = torch.full((count, 1), 0.3, device=where)
    drive = sample_drive(energy, torch.full((count, 1), 0.7, device=where), generator)
    drive[..., DRIVE.index("blink")] = 0.0
    return as_motion(drive, mouth)


def detail_weight(person: Person, motion: Motion, size: int = 64) -> Tensor:
    """Where detail matters: [N, 1, size, size], 1 on the wall, up to 5 on the mouth and 3 on the eyes."""
    grid = (torch.arange(size, device=person["head_x"].device) + 0.5) * 2 / size - 1
    sy, sx = grid[None, :, None], grid[None, None, :]

    def p(name: str) -> Tensor:
        return person[name][:, None, None]

    scale = p("head_scale")
    x = (sx - p("head_x") - motion["tx"][:, None, None]) / scale - 0.085 * motion["yaw"][:, None, None]
    y = (sy - p("head_y") - motion["ty"][:, None, None]) / scale - 0.07 * motion["pitch"][:, None, None]
    weight = 1 + 4 * torch.exp(-((x / 0.22) ** 2 + ((y - p("mouth_y")) / 0.13) ** 2))
    for s in (-1, 1):
        weight = weight + 2 * torch.exp(-(((x - s * p("eye_x")) / 0.12) ** 2 + ((y - p("eye_y")) / 0.11) ** 2))
    return weight[:, None]


def mouth_opening_pixels(person: Person, motion: Motion) -> tuple[Tensor, Tensor]:
    """Height of the gap between the lips and half the mouth's width, both in pixels of a SIZE picture; [N] each."""
    scale = person["head_scale"] * (1 + motion["zoom"]) * SIZE / 2
    half = person["mouth_w"] * (1 + 0.22 * motion["width"] - 0.42 * motion["pucker"]) * scale
    return person["mouth_gain"] * motion["opening"] * scale, half
