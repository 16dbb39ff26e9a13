"""Colour profiles: read as Pillow reads them, written so that Pillow reads them again."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from dsgnn.runtime.photo.profile import colour_profile, with_profile

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LONG = SRGB[:128] + bytes(range(256)) * 700  # of several segments; nobody reads its tags here
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))


def encoded(form: str, profile: bytes | None, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    PHOTO.convert(mode).save(file, form, icc_profile=profile)
    return file.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("profile", [SRGB, LONG])
def test_a_profile_is_found(form: str, profile: bytes) -> None:
    assert colour_profile(encoded(form, profile)) == profile


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_a_photo_without_one_has_none(form: str) -> None:
    assert colour_profile(encoded(form, None)) is None


def test_a_profile_of_other_channels_is_none() -> None:
    cmyk = SRGB[:16] + b"CMYK" + SRGB[20:]
    assert colour_profile(encoded("JPEG", cmyk, "CMYK")) is None


@pytest.mark.parametrize("profile", [SRGB, LONG])
def test_a_profile_is_put_into_a_jpeg(profile: bytes) -> None:
    plain = encoded("JPEG", None)
    made = Image.open(io.BytesIO(with_profile(plain, profile)))
    assert made.info["icc_profile"] == profile
    assert np.array_equal(np.asarray(made), np.asarray(Image.open(io.BytesIO(plain))))


@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(0, 3000), st.binary(max_size=40))
def test_damage_is_survived(form: str, at: int, noise: bytes) -> None:
    data = encoded(form, SRGB)
    colour_profile(data[:at])
    colour_profile(data[:at] + noise + data[at + len(noise) :])
