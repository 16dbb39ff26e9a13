"""r50-assr with the reference weights, from the network to ranks out of an ONNX file."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from golden import arrays, published_model

from dsgnn.export.deploy.network import DeployGraph
from dsgnn.export.onnx import ExportSource, build_onnx, describe, described, export_onnx
from dsgnn.export.parity.comparison import parity_photos
from dsgnn.runtime import Ranker

CONFIG, SEED, SIZE = "r50-assr", 4, (448, 576)  # the photo fits this size as upstream resized it


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return arrays("forward_r50_assr_4")


@pytest.fixture(scope="module")
def source() -> ExportSource:
    return ExportSource(published_model(CONFIG, SEED), "synthetic", "0" * 64)


@pytest.fixture(scope="module")
def exported(source: ExportSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "r50-assr.onnx"
    graph = DeployGraph(source.model, SIZE).eval()
    proto = build_onnx(graph, source.model.config.outputs, SIZE, SIZE)
    onnx.save(described(proto, describe(source, SIZE)), path)
    return path


def test_a_photo_gets_the_published_ranks_and_masks(
    exported: Path, golden: dict[str, np.ndarray]
) -> None:
    ranking = Ranker(exported, if_none="all", specks="keep")(golden["image"])
    found = sorted(ranking.objects, key=lambda item: item.query)  # upstream keeps the query order
    n, h, w = golden["final_mask_shape"]
    assert [n + 1 - item.rank for item in found] == golden["final_ranks"].tolist()
    np.testing.assert_allclose([o.saliency for o in found], golden["final_scores"], 0, 1e-4)
    masks = np.unpackbits(golden["final_masks"])[: n * h * w].reshape(n, h, w).astype(bool)
    for item, mask in zip(found, masks, strict=True):
        assert (item.mask ^ mask).sum() <= 50


@pytest.mark.slow
def test_it_passes_the_gate(
    source: ExportSource, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    photos = [*parity_photos(), golden["image"]]
    sidecar, results = export_onnx(source, tmp_path / "r50-assr.onnx", photos, SIZE)
    assert sidecar.verified
    assert max(result.saliency_max for result in results) < 1e-4
    assert [result.batch for result in results] == [1, 3, 8, 1]
