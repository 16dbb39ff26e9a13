"""Colours of photos become those of sRGB, as Little CMS (in Pillow) makes them."""

import io
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from dsgnn.runtime.images import decode, read_image
from dsgnn.runtime.photo.profile import colour_profile, to_srgb

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LONG = SRGB[:128] + bytes(range(256)) * 700  # of several segments; nobody reads its tags here
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))


def encoded(form: str, profile: bytes | None, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    PHOTO.convert(mode).save(file, form, icc_profile=profile)
    return file.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("profile", [SRGB, LONG])
def test_a_profile_is_found(form: str, profile: bytes) -> None:
    assert colour_profile(encoded(form, profile)) == profile


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "AVIF"])
def test_a_photo_without_one_has_none(form: str) -> None:
    assert colour_profile(encoded(form, None)) is None


def test_a_profile_of_other_channels_is_none() -> None:
    cmyk = SRGB[:16] + b"CMYK" + SRGB[20:]
    assert colour_profile(encoded("JPEG", cmyk, "CMYK")) is None


@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "AVIF"]),
    st.integers(0, 3000),
    st.binary(max_size=40),
)
def test_damage_is_survived(form: str, at: int, noise: bytes) -> None:
    data = encoded(form, SRGB)
    colour_profile(data[:at])
    colour_profile(data[:at] + noise + data[at + len(noise) :])


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(65536 * value) for value in values))


GAMMA = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * 2.19921875))
SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
LINEAR = b"curv\0\0\0\0" + struct.pack(">I", 0)
TABLE = b"curv\0\0\0\0" + struct.pack(
    ">I1024H", 1024, *(round(65535 * (i / 1023) ** 1.8) for i in range(1024))
)
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
PROPHOTO = ((0.7977, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491))


def profile_of(columns: tuple[tuple[float, ...], ...], curve: bytes) -> bytes:
    """An ICC profile of three primaries (XYZ, D50) and one curve."""
    curve += bytes(-len(curve) % 4)
    values = {
        b"rXYZ": b"XYZ \0\0\0\0" + fixed(*columns[0]),
        b"gXYZ": b"XYZ \0\0\0\0" + fixed(*columns[1]),
        b"bXYZ": b"XYZ \0\0\0\0" + fixed(*columns[2]),
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    at, table, body = 132 + 12 * len(values), struct.pack(">I", len(values)), b""
    for name, value in values.items():
        table += struct.pack(">4sII", name, at + len(body), len(value))
        body += value
    head = struct.pack(
        ">I4sI4s4s4s", at + len(body), b"lcms", 0x04200000, b"mntr", b"RGB ", b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + body


ALL = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), axis=-1).reshape(
    18, -1, 3
)


@pytest.mark.parametrize(
    ("columns", "curve"),
    [(P3, SRGB_CURVE), (ADOBE, GAMMA), (PROPHOTO, TABLE), (P3, LINEAR), (ADOBE, TABLE)],
)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_colours_become_those_of_srgb(columns, curve: bytes, form: str) -> None:
    profile = profile_of(columns, curve)
    file = io.BytesIO()
    lossless = {"lossless": True} if form == "WEBP" else {}
    Image.fromarray(ALL).save(file, form, icc_profile=profile, **lossless)
    expected = ImageCms.profileToProfile(
        Image.fromarray(ALL), io.BytesIO(profile), io.BytesIO(SRGB), renderingIntent=1
    )
    assert np.abs(np.asarray(expected).astype(int) - ALL).max() > 20
    difference = np.abs(decode(file.getvalue()).astype(int) - np.asarray(expected))
    assert difference.max() <= 3 and difference.mean() < 0.3


def test_display_p3_of_a_phone_is_not_pale() -> None:
    """The red of sRGB, as a phone writes it in Display P3: (234, 51, 35)."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (234, 51, 35)).save(
        file, "JPEG", quality=98, icc_profile=profile_of(P3, SRGB_CURVE)
    )
    np.testing.assert_allclose(decode(file.getvalue())[24, 32], (255, 0, 0), atol=6)


def test_srgb_and_no_profile_change_nothing() -> None:
    for profile in (None, SRGB, profile_of(P3, SRGB_CURVE)[:200], b"", LONG):
        file = io.BytesIO()
        Image.fromarray(ALL).save(file, "PNG", icc_profile=profile)
        np.testing.assert_array_equal(decode(file.getvalue()), ALL)


def test_alpha_is_laid_on_white_in_srgb() -> None:
    rgba = np.full((4, 4, 4), (234, 51, 35, 255), np.uint8)
    rgba[2:, :, 3] = 0
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, "PNG", icc_profile=profile_of(P3, SRGB_CURVE))
    image = decode(file.getvalue())
    np.testing.assert_allclose(image[0, 0], (255, 0, 0), atol=2)
    assert image[3, 3].tolist() == [255, 255, 255]


def test_avif_by_numbers(tmp_path: Path) -> None:
    """Phones write Display P3 as primaries 12 in place of a profile."""
    pixels = np.full((48, 64, 3), (234, 51, 35), np.uint8)
    data = cv2.imencode(".avif", pixels[..., ::-1], [cv2.IMWRITE_AVIF_QUALITY, 100])[1].tobytes()
    at = data.index(b"nclx") + 4
    p3 = data[:at] + struct.pack(">HH", 12, 13) + data[at + 4 :]
    np.testing.assert_allclose(decode(p3)[24, 32], (255, 0, 0), atol=8)
    np.testing.assert_allclose(decode(data)[24, 32], (234, 51, 35), atol=8)


@given(st.integers(0, 600), st.binary(max_size=40))
def test_a_damaged_profile_changes_nothing_or_something(at: int, noise: bytes) -> None:
    profile = profile_of(P3, SRGB_CURVE)
    damaged = profile[:at] + noise + profile[at + len(noise) :]
    assert to_srgb(ALL, damaged).shape == ALL.shape


def test_pillow_pictures_are_read_as_their_files(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = np.dstack([ALL, np.full(ALL.shape[:2], 128, np.uint8)])
    Image.fromarray(rgba).save(path, icc_profile=profile_of(P3, SRGB_CURVE), exif=exif)
    np.testing.assert_array_equal(read_image(Image.open(path)), read_image(path))
    for mode in ("L", "LA", "P", "1", "CMYK"):
        picture = PHOTO.convert("L" if mode == "LA" else "RGB").convert(mode)
        file = io.BytesIO()
        picture.save(file, "TIFF" if mode != "P" else "PNG")
        expected = np.asarray(picture.convert("RGB"))
        np.testing.assert_allclose(read_image(picture), expected, atol=1)
    with pytest.raises(ValueError, match="of 8 bits per channel, got Pillow's mode I;16: scale it"):
        read_image(Image.fromarray(np.zeros((4, 4), np.uint16)))
