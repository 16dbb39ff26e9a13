"""People's attention: without the padding, as shares of objects, and from a graph to the JSON."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsgnn.runtime import Ranker
from dsgnn.runtime.attention import attention_shares, crop_attention
from dsgnn.runtime.backends import open_backend
from dsgnn.runtime.errors import ArtifactError
from dsgnn.runtime.letterbox import Fixed, Geometry, LongestSide, letterbox
from dsgnn.runtime.postprocess import postprocess

from .conftest import description

Write = Callable[..., Path]
RNG = np.random.default_rng(0)
# Cells of 16 × 16: half of the first's last column is on the photo, and 1/16 of the second's.
GEOMETRIES = [
    Geometry((96, 72), (96, 72), (96, 128)),
    Geometry((160, 130), (80, 65), (96, 128)),
    Geometry((64, 128), (64, 128), (64, 128)),
]


def softmax(*shape: int) -> np.ndarray:
    values = np.exp(RNG.normal(size=shape))
    return (values / values.sum()).astype(np.float32)


def pixels(attention: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The naive way: spread every cell over its pixels, cut the photo out, repeat pixels."""
    cell = geometry.padded[0] // attention.shape[0]
    spread = np.kron(attention.astype(np.float64), np.ones((cell, cell)))
    spread = spread[: geometry.resized[0], : geometry.resized[1]]
    factor = geometry.original[0] // geometry.resized[0]
    spread = np.kron(spread, np.ones((factor, factor)))
    return spread / spread.sum()


def visible(masks: list[np.ndarray]) -> list[np.ndarray]:
    """Each mask without what smaller ones take of it."""
    return [
        mask & ~np.any([other for other in masks if other.sum() < mask.sum()], axis=0)
        if any(other.sum() < mask.sum() for other in masks)
        else mask
        for mask in masks
    ]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_shares_are_those_of_the_pixels(geometry: Geometry) -> None:
    attention = softmax(geometry.padded[0] // 16, 8)
    grid = crop_attention(attention, geometry)
    expected = pixels(attention, geometry)
    rows, columns = (-(-side // 16) for side in geometry.resized)
    assert grid.shape == (rows, columns) and grid.dtype == np.float32
    assert grid.sum() == pytest.approx(1, abs=1e-6)
    cell = 16 * geometry.original[0] // geometry.resized[0]
    for row in range(rows):
        for column in range(columns):
            part = expected[cell * row : cell * (row + 1), cell * column : cell * (column + 1)]
            assert grid[row, column] == pytest.approx(part.sum(), abs=1e-7)
    h, w = geometry.original
    masks = [np.zeros((h, w), bool) for _ in range(4)]
    masks[0][5 : h - 3, 7 : w - 1] = True
    masks[1][h // 2 :, w // 3 :] = True
    masks[2][h // 2 + 3 : h // 2 + 9, w // 2 : w // 2 + 7] = True
    shares = attention_shares(grid, attention.shape, masks, geometry)
    for share, mask in zip(shares, visible(masks), strict=True):
        assert share == pytest.approx(expected[mask].sum(), abs=1e-6)
    assert shares[3] == 0 and 0 < shares[2] < shares[1] < shares[0]


@pytest.mark.parametrize("shape", [(301, 77), (100, 640), (1, 1), (3, 2000)])
@pytest.mark.parametrize("rule", [Fixed(96, 128), LongestSide(128)])
def test_parts_of_a_photo_share_all_of_it(shape: tuple[int, int], rule) -> None:
    """Sizes where no edge of a pixel is one of a cell."""
    geometry = rule.geometry(*shape)
    attention = softmax(geometry.padded[0] // 16, geometry.padded[1] // 16)
    grid = crop_attention(attention, geometry)
    labels = RNG.integers(0, 3, shape)
    masks = [labels == label for label in range(3)]
    shares = attention_shares(grid, attention.shape, masks, geometry)
    assert shares.sum() == pytest.approx(1, abs=1e-5)
    (all_of_it,) = attention_shares(grid, attention.shape, [np.ones(shape, bool)], geometry)
    assert all_of_it == pytest.approx(1, abs=1e-5)


def test_the_first_of_equal_masks_takes_what_they_share() -> None:
    geometry = GEOMETRIES[2]
    attention = softmax(4, 8)
    masks = [np.ones(geometry.original, bool)] * 2
    shares = attention_shares(attention, attention.shape, masks, geometry)
    assert shares.tolist() == [pytest.approx(1, abs=1e-6), 0]


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (np.full((6, 8), np.nan, np.float32), "negative, not finite or nowhere on the photo"),
        (np.full((6, 8), np.inf, np.float32), "negative, not finite"),
        (np.full((6, 8), -1, np.float32), "negative, not finite"),
        (np.pad(np.ones((6, 1), np.float32), ((0, 0), (7, 0))), "nowhere on the photo"),
        (np.zeros((0, 8), np.float32), r"at least one cell .* got \(0, 8\)"),
        (np.zeros((1, 6, 8), np.float32), r"got \(1, 6, 8\)"),
        (np.zeros((97, 8), np.float32), r"at most \(96, 128\), got \(97, 8\)"),
    ],
)
def test_attention_that_means_nothing(attention: np.ndarray, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        crop_attention(attention, GEOMETRIES[0])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("order", ["saliency", "attention"])
def test_from_a_graph_to_the_json(
    backend: str, order: str, photo: np.ndarray, tmp_path: Path, write_model: Write
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip(backend)
    path = write_model(tmp_path / "m.onnx", attention=True, order=order)
    ranking = Ranker(path, backend)(photo)
    padded, geometry = letterbox(photo, Fixed(96, 128))
    outputs = open_backend(path, "onnxruntime").infer({"image": padded[None]})
    (attention,) = outputs["attention"]
    assert attention.shape == (6, 8) and attention.sum() == pytest.approx(1, abs=1e-5)
    assert ranking.attention is not None
    np.testing.assert_allclose(ranking.attention, crop_attention(attention, geometry), atol=1e-5)
    expected = np.kron(attention, np.ones((8, 8))) / 64  # the photo is half as large as the input
    first, second = ranking.objects
    # The red object is larger, so its saliency is; the blue one is looked at more.
    assert [first.query, second.query] == ([0, 2] if order == "saliency" else [2, 0])
    for item in ranking.objects:
        assert item.attention == pytest.approx(expected[item.mask].sum(), abs=1e-4)
    if order == "attention":
        assert [first.saliency, second.saliency] == [first.attention, second.attention]
        assert first.saliency > second.saliency
    facts = json.loads(json.dumps(ranking.to_dict()))
    assert [entry["attention"] for entry in facts["objects"]] == [first.attention, second.attention]


def test_a_batch_of_several_sizes(scene, tmp_path: Path, write_model: Write) -> None:
    pytest.importorskip("onnx")
    ranker = Ranker(
        write_model(tmp_path / "m.onnx", input=LongestSide(128), attention=True, order="attention")
    )
    photos = [
        scene(48, 64, red=(8, 4, 40, 36), blue=(20, 44, 36, 60)),
        scene(64, 40, blue=(2, 2, 20, 30), green=(30, 10, 60, 38)),
        scene(48, 64),
    ]
    for photo, ranking in zip(photos, ranker.batch(photos), strict=True):
        alone = ranker(photo)
        np.testing.assert_allclose(ranking.attention, alone.attention, atol=1e-6)
        pairs = zip(ranking.objects, alone.objects, strict=True)
        assert all(one.attention == pytest.approx(other.attention) for one, other in pairs)
    assert ranker(photos[1]).attention.shape == (8, 5)


def test_an_artifact_without_it(model: Path, photo: np.ndarray) -> None:
    ranking = Ranker(model)(photo)
    assert ranking.attention is None
    assert all(item.attention is None for item in ranking.objects)
    assert all("attention" not in entry for entry in ranking.to_dict()["objects"])


def test_a_graph_without_the_attention_it_is_said_to_have(model: Path, write_model: Write) -> None:
    write_model(model, metadata=description(attention=True).to_json())
    message = r"expected attention to be float32 \(any, any, any\), got no such tensor"
    with pytest.raises(ArtifactError, match=message):
        Ranker(model)


def test_nothing_is_found() -> None:
    """An empty scene has attention, and no shares."""
    geometry = GEOMETRIES[0]
    nothing = postprocess(
        np.zeros(5),
        np.zeros(5),
        np.zeros((5, 24, 32)),
        geometry,
        0.5,
        attention=softmax(6, 8),
        order="attention",
    )
    assert nothing.objects == () and nothing.attention is not None
    assert nothing.attention.sum() == pytest.approx(1, abs=1e-6)
