"""Graphs that several modules start from: tracing them is what costs time. Copy before a change."""

import onnx
import pytest
import torch

from dsgnn.export.deploy.network import DeployGraph
from dsgnn.export.onnx import ExportSource, build_onnx
from dsgnn.model import build_model

from .test_deploy import shake, small

SIZE = (64, 96)


@pytest.fixture(scope="session")
def small_source() -> ExportSource:
    """r50-assr in every part but with small widths."""
    torch.manual_seed(1)
    return ExportSource(shake(build_model(small("r50-assr"))), "synthetic", "0" * 64)


@pytest.fixture(scope="session")
def small_graph(small_source: ExportSource) -> onnx.ModelProto:
    return build_onnx(
        DeployGraph(small_source.model, SIZE).eval(), small_source.model.config.outputs, SIZE, SIZE
    )


@pytest.fixture(scope="session")
def nano_source() -> ExportSource:
    torch.manual_seed(5)
    return ExportSource(build_model("nano"), "synthetic", "0" * 64)


@pytest.fixture(scope="session")
def nano_graph(nano_source: ExportSource) -> onnx.ModelProto:
    return build_onnx(
        DeployGraph(nano_source.model, SIZE).eval(), nano_source.model.config.outputs, SIZE, SIZE
    )
