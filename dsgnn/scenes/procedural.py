"""Textures and shapes out of nothing: variety for composite scenes, and all of it without folders.

Every function draws from the generator it is given and from nothing else.
"""

from __future__ import annotations

import cv2
import numpy as np

from dsgnn.scenes.material import Cutout, premultiplied


def texture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A gradient, cloud, stripe or checker texture, size (H, W): (H, W, 3) uint8 RGB."""
    h, w = size
    first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    pattern = rng.integers(4)
    if pattern == 0:
        blend = _ramp(rng, size, 1.0)
    elif pattern == 1:
        blend = _clouds(rng, size)
    elif pattern == 2:
        blend = 0.5 + 0.5 * np.sin(_ramp(rng, size, rng.uniform(10, 120)))
    else:
        waves = np.sin(_ramp(rng, size, rng.uniform(10, 60)))
        blend = (waves * np.sin(_ramp(rng, size, rng.uniform(10, 60))) > 0).astype(np.float32)
    blend = 0.8 * blend + 0.2 * _clouds(rng, size)
    return (first + (second - first) * blend[..., None]).clip(0, 255).astype(np.uint8)


def shape(rng: np.random.Generator, size_px: int = 112) -> Cutout:
    """A smooth blob, an ellipse, a polygon or a ring with one to three textured parts."""
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    form = rng.integers(4)
    if form == 0:  # Fourier blob
        waves = np.arange(2, 7)
        amplitude = rng.normal(0, 0.22, 5) / waves**0.7
        radius = 1 + (amplitude * np.cos(np.outer(angles, waves) + rng.uniform(0, 6.3, 5))).sum(1)
    elif form == 1:  # polygon of 3 to 8 corners
        corners = int(rng.integers(3, 9))
        even = np.arange(corners) * 0.7 * 2 * np.pi / corners
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners) * 0.3 + even)
        radius = rng.uniform(0.5, 1, corners)
    else:  # ellipse, or ring below
        radius = np.ones_like(angles)
    points = np.stack([np.cos(angles), np.sin(angles) * rng.uniform(0.35, 1)], 1) * radius[:, None]
    points = (points - points.min(0)) / max(np.ptp(points, 0).max(), 1e-6)
    outline = np.rint(4 + points * (size_px - 9)).astype(np.int32)
    width, height = outline.max(0) + 5
    alpha = np.zeros((height, width), np.uint8)
    cv2.fillPoly(alpha, [outline], 255, cv2.LINE_AA)
    if form == 3:
        centre = outline.mean(0)
        inner = np.rint(centre + (outline - centre) * rng.uniform(0.3, 0.6)).astype(np.int32)
        cv2.fillPoly(alpha, [inner], 0, cv2.LINE_AA)
    colours = texture(rng, (height, width))
    for _ in range(int(rng.integers(0, 3))):  # objects of several colours are still one object
        part = _ramp(rng, (height, width), 1.0) > rng.uniform(0.3, 0.7)
        colours[part] = texture(rng, (height, width))[part]
    return Cutout(premultiplied(np.dstack([colours, alpha])))


def _ramp(rng: np.random.Generator, size: tuple[int, int], length: float) -> np.ndarray:
    """0…length along a random direction, (H, W) float32."""
    angle = rng.uniform(0, 2 * np.pi)
    y = np.linspace(-0.5, 0.5, size[0], dtype=np.float32)[:, None]
    x = np.linspace(-0.5, 0.5, size[1], dtype=np.float32)[None]
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    return (along / 1.4142 + 0.5) * np.float32(length)


def _clouds(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Noise of three octaves in 0…1, (H, W) float32."""
    h, w = size
    total = np.zeros(size, np.float32)
    for cells, weight in zip((3, 9, 40), (0.5, 0.3, 0.2), strict=True):
        noise = rng.random((cells, cells), dtype=np.float32)
        total += weight * cv2.resize(noise, (w, h), interpolation=cv2.INTER_LINEAR)
    return total
