"""Pasting cut-outs on a canvas with exact visible masks, and the colours of the whole frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from dsgnn.scenes.material import Cutout, resized


@dataclass(frozen=True)
class Layer:
    """A cut-out, transformed and clipped to the frame, ready to paste.

    colour: (h, w, 3) float32 multiplied by alpha. alpha: (h, w) float32 0…1. x, y: its place in
    the frame, pixels. shadow: strength 0…1. base: bottom edge before clipping; what is lower
    stands in front.
    """

    colour: np.ndarray
    alpha: np.ndarray
    x: int
    y: int
    shadow: float
    base: float

    @property
    def window(self) -> tuple[slice, slice]:
        h, w = self.alpha.shape
        return slice(self.y, self.y + h), slice(self.x, self.x + w)


def make_layer(
    rng: np.random.Generator,
    background: np.ndarray,
    cutout: Cutout,
    long_px: float,
    centre: np.ndarray,
    faint: bool = False,
) -> Layer | None:
    """Scale, flip, rotate, recolour and soften a cut-out and place it.

    background: (H, W, 3) uint8, what it has to fit in with. long_px: its longest side in pixels.
    centre: (2,) XY in pixels; sides on which the object is cut are moved to the frame's edge.
    faint: as clutter, blurred and faded into the background. None if less than 25% of it lies in
    the frame.
    """
    patch, cut = cutout.rgba, cutout.cut
    if rng.random() < 0.5:
        patch, cut = cv2.flip(patch, 1), (cut[2], cut[1], cut[0], cut[3])
    scale = long_px / max(patch.shape[:2])
    h, w = (max(2, round(side * scale)) for side in patch.shape[:2])
    patch = resized(patch, (h, w), scale < 1)
    if not any(cut) and rng.random() < 0.6:
        patch = _rotated(patch, rng.normal(0, 10))
    sigma = rng.uniform(0.3, 0.9) if not faint else rng.uniform(0.8, 2.5)
    if not any(cut):
        patch = cv2.copyMakeBorder(patch, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(0, 0, 0, 0))
    patch = cv2.GaussianBlur(patch, (0, 0), sigma, None, 0, cv2.BORDER_REPLICATE)

    frame_h, frame_w = background.shape[:2]
    h, w = patch.shape[:2]
    over = rng.uniform(0, 0.08, 2)
    x, y = centre[0] - w / 2, centre[1] - h / 2
    if cut[0] or cut[2]:
        x = -over[0] * w if cut[0] else frame_w - w * (1 - over[0])
    if cut[1] or cut[3]:
        y = -over[1] * h if cut[1] else frame_h - h * (1 - over[1])
    x, y = round(x), round(y)
    total = cv2.countNonZero(patch[..., 3])
    base = y + h
    patch = patch[max(0, -y) : frame_h - y, max(0, -x) : frame_w - x]
    x, y = max(0, x), max(0, y)
    if patch.size == 0 or cv2.countNonZero(patch[..., 3]) < 0.25 * total:
        return None

    h, w = patch.shape[:2]
    alpha = patch[..., 3].astype(np.float32) / 255
    around = background[max(0, y - h // 2) : y + h + h // 2, max(0, x - w // 2) : x + w + w // 2]
    target = np.array(cv2.mean(around)[:3], np.float32)
    own = np.array(cv2.mean(patch)[:3], np.float32) / max(float(alpha.mean()), 1e-3)
    blend = rng.uniform(0.3, 0.7) if faint else rng.uniform(0, 0.3)
    gain = np.float32(1 - blend if faint else rng.uniform(0.8, 1.15))
    shift = (own + (target - own) * np.float32(blend)) - own * gain  # the mean ends on the blend
    if not faint:
        shift += np.float32(rng.normal(0, 8))
    colour = patch[..., :3] * gain + alpha[..., None] * shift
    shadow = rng.uniform(0.15, 0.5) if rng.random() < 0.35 and not faint else 0.0
    return Layer(colour, alpha, x, y, shadow, base)


def _rotated(patch: np.ndarray, degrees: float) -> np.ndarray:
    h, w = patch.shape[:2]
    matrix = cv2.getRotationMatrix2D(((w - 1) / 2, (h - 1) / 2), degrees, 1)
    new_w = int(np.ceil(h * abs(matrix[0, 1]) + w * abs(matrix[0, 0])))
    new_h = int(np.ceil(h * abs(matrix[0, 0]) + w * abs(matrix[0, 1])))
    matrix[:, 2] += (new_w - w) / 2, (new_h - h) / 2
    return cv2.warpAffine(patch, matrix, (new_w, new_h), flags=cv2.INTER_LINEAR)


def flatten(
    background: np.ndarray, masks: Sequence[np.ndarray], layers: Sequence[Layer]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Paste layers back to front onto a background that may hold objects itself.

    background: (H, W, 3) uint8. masks: (H, W) bool each, objects already in it. Returns the
    picture and the visible masks of those objects and then of the layers; a pixel belongs to a
    layer where its alpha is above one half and nothing in front covers it.
    """
    canvas = background.copy()
    visible = [mask.copy() for mask in masks]
    for layer in layers:
        window = layer.window
        if layer.shadow:
            _cast_shadow(canvas, layer)
        inverse = np.float32(1) - layer.alpha
        blended = canvas[window] * inverse[..., None] + layer.colour
        canvas[window] = np.clip(blended + np.float32(0.5), 0, 255)
        opaque = layer.alpha > 0.5
        for mask in visible:
            mask[window] &= ~opaque
        mask = np.zeros(canvas.shape[:2], bool)
        mask[window] = opaque
        visible.append(mask)
    return canvas, visible


def _cast_shadow(canvas: np.ndarray, layer: Layer) -> None:
    h, w = layer.alpha.shape
    soft = max(3, int(0.12 * min(h, w)) | 1)
    wide = cv2.copyMakeBorder(layer.alpha, soft, soft, soft, soft, cv2.BORDER_CONSTANT, value=0)
    dark = np.multiply(cv2.blur(wide, (soft, soft)), np.float32(layer.shadow))
    y, x = layer.y - soft + soft // 2, layer.x - soft + soft // 3  # falls below and beside
    dark = dark[max(0, -y) : canvas.shape[0] - y, max(0, -x) : canvas.shape[1] - x]
    y, x = max(0, y), max(0, x)
    window = slice(y, y + dark.shape[0]), slice(x, x + dark.shape[1])
    canvas[window] = canvas[window] * (1 - dark)[..., None]


_NOISE_PX = 512


def develop(rng: np.random.Generator, image: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Jitter brightness, contrast, gamma, tint, saturation, blur, noise and JPEG quality.

    image: (H, W, 3) uint8 RGB, returned likewise; no pixel moves. strength: 1 for composites.
    """
    levels = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    gamma = np.exp(rng.normal(0, 0.2 * strength))
    contrast, tint = rng.normal(1, 0.12 * strength), rng.normal(0, 0.03 * strength, 3)
    curve = (levels**gamma - 0.5) * contrast + 0.5 + tint + rng.normal(0, 0.05 * strength)
    image = cv2.LUT(image, np.clip(curve * 255, 0, 255).astype(np.uint8)[None])
    if rng.random() < 0.4 * strength:
        grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        amount = rng.uniform(-0.4, 0.6) if rng.random() < 0.9 else 1.0
        image = cv2.addWeighted(image, 1 - amount, grey, amount, 0)
    if rng.random() < 0.15:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.2))
    if rng.random() < 0.35:
        image = _noisy(rng, image, rng.uniform(1, 9))
    if rng.random() < 0.3:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(35, 95))]
        coded = cv2.imencode(".jpg", image, quality)[1]
        image = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))
    return image


@cache
def _noise() -> np.ndarray:
    """(_NOISE_PX, _NOISE_PX, 3) int16, of standard deviation 32."""
    tile = np.random.default_rng(0).standard_normal((_NOISE_PX, _NOISE_PX, 3))
    return np.clip(tile * 32, -127, 127).astype(np.int16)


def _noisy(rng: np.random.Generator, image: np.ndarray, sigma: float) -> np.ndarray:
    """Add Gaussian noise out of one stored tile: fresh noise would cost more than the scene."""
    h, w = image.shape[:2]
    repeats = 1 + (max(h, w) - 1) // _NOISE_PX
    tile = np.tile(_noise(), (repeats, repeats, 1)) if repeats > 1 else _noise()
    y, x = (int(rng.integers(0, side - n + 1)) for side, n in zip(tile.shape, (h, w), strict=False))
    return cv2.add(image, tile[y : y + h, x : x + w] * (sigma / 32), dtype=cv2.CV_8U)
