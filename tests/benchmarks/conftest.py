"""Result files of fake subjects."""

from pathlib import Path

import pytest

from .fakes import measured, timed


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [timed(tmp_path, up=40.0, fast=10.0), measured(tmp_path)]
