"""The gaze network, its file and its training, on photos made here."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from dsgnn.data.gaze import GazePhoto, density, gaze_split, read_gaze
from dsgnn.runtime.errors import CheckpointError, DataError, OptionError
from dsgnn.teacher.cli import main
from dsgnn.teacher.network import (
    GazeConfig,
    GazeNetwork,
    Teacher,
    load_teacher,
    resize,
    save_teacher,
)
from dsgnn.teacher.training import (
    GazeRecipe,
    divergence,
    mean_divergence,
    parse_members,
    prepare,
    train_network,
    train_step,
)

TINY = GazeConfig(backbone="efficientnet_lite0", size=64, width=8, sources=("A", "B"))


@pytest.fixture(scope="module")
def network() -> GazeNetwork:
    torch.manual_seed(0)
    network = GazeNetwork(TINY)
    with torch.no_grad():
        network.priors.normal_()
    return network.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve photos with a bright square each, where everybody looks, of two splits."""
    folder = tmp_path_factory.mktemp("gaze")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for number in range(12):
        x, y = (int(value) for value in rng.integers(4, (60, 44)))
        image = rng.integers(0, 40, (48, 64, 3), dtype=np.uint8)
        cv2.rectangle(image, (x - 4, y - 4), (x + 4, y + 4), (255, 255, 255), -1)
        cv2.imwrite(str(folder / "images" / f"{number}.png"), image)
        entries.append({
            "file_name": f"{number}.png", "width": 64, "height": 48, "source": "AB"[number % 2],
            "points": [[x, y], [x + 1, y - 2]],
        })  # fmt: skip
    (folder / "fixations.json").write_text(json.dumps({"images": entries}))
    return folder


def photo(h: int, w: int) -> np.ndarray:
    return np.random.default_rng(h * w).integers(0, 256, (h, w, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("side", "cells"),
    [((300, 400), (6, 8)), ((400, 300), (8, 6)), ((50, 640), (1, 8)), ((33, 33), (8, 8))],
)
def test_the_map_covers_the_photo_and_nothing_else(network, side, cells):
    """No cell is padding: the grid has the photo's shape and holds all of the probability."""
    attention = Teacher([network]).predict(photo(*side))
    assert attention.shape == cells and attention.dtype == np.float32
    assert attention.sum() == pytest.approx(1, abs=1e-5) and (attention > 0).all()
    assert resize(photo(*side), 64).shape == (cells[0] * 8, cells[1] * 8, 3)


def test_a_mirrored_photo_has_the_mirrored_map(network):
    teacher = Teacher([network])
    image = photo(48, 64)
    mirrored = teacher.predict(image[:, ::-1].copy())[:, ::-1]
    np.testing.assert_allclose(teacher.predict(image), mirrored, atol=1e-6)
    plain = teacher.predict(image, flip=False)
    assert np.abs(plain - teacher.predict(image[:, ::-1].copy(), flip=False)[:, ::-1]).max() > 1e-4


def test_the_source_chooses_the_centre_map(network):
    teacher = Teacher([network])
    a, b, default = (teacher.predict(photo(48, 64), source) for source in ("A", "B", None))
    assert np.abs(a - b).max() > 1e-4 and (a == default).all()
    with pytest.raises(OptionError, match="source 'C' is unknown; the teacher has A, B"):
        teacher.predict(photo(48, 64), "C")


def test_a_batch_gives_what_single_photos_give(network):
    torch.manual_seed(1)
    images, sources = torch.randn(3, 3, 48, 64), torch.tensor([0, 1, 0])
    with torch.no_grad():
        together = network(images, sources)
        alone = [network(images[i : i + 1], sources[i : i + 1])[0] for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.exp().sum((1, 2)), torch.ones(3))


def test_members_are_averaged():
    torch.manual_seed(2)
    both = Teacher([GazeNetwork(TINY), GazeNetwork(replace(TINY, size=96, width=16))])
    image = photo(48, 64)
    maps = [Teacher([member]).predict(image) for member in both.members]
    assert [found.shape for found in maps] == [(6, 8), (9, 12)]
    second = torch.nn.functional.interpolate(
        torch.from_numpy(maps[1])[None, None], (6, 8), mode="bilinear", align_corners=False
    )[0, 0].numpy()  # fmt: skip
    expected = (maps[0] + second / second.sum()) / 2
    np.testing.assert_allclose(both.predict(image), expected, atol=1e-6)


def test_every_parameter_but_the_frozen_ones_gets_a_gradient():
    torch.manual_seed(3)
    network = GazeNetwork(TINY).train()
    network(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))[:, 2, 3].sum().backward()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    without = [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    # The bias of the one logit per cell shifts all cells alike, which the softmax takes out.
    assert set(without) <= {"readout.8.bias"}
    frozen = {name for name, _ in network.named_parameters()} - set(trained)
    starts = ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2")
    assert frozen and all(
        n.startswith(tuple(f"backbone.body.{s}." for s in starts)) for n in frozen
    )
    assert any(name.startswith("backbone.body.blocks.3.") for name in trained)


def test_training_keeps_the_backbones_statistics(network):
    norm = network.train().backbone["body"].blocks[6][0].bn1
    assert not norm.training and network.readout.training
    network.eval()


@pytest.mark.parametrize(("half", "bound"), [(False, 0), (True, 2e-3)])
def test_a_saved_teacher_predicts_the_same(tmp_path, network, half, bound):
    teacher = Teacher([network, GazeNetwork(replace(TINY, size=96))])
    path = tmp_path / "teacher.safetensors"
    save_teacher(path, teacher, half=half)
    loaded = load_teacher(path)
    assert [member.config for member in loaded.members] == [m.config for m in teacher.members]
    assert not loaded.training and loaded.members[0].priors.dtype == torch.float32
    image = photo(48, 64)
    np.testing.assert_allclose(loaded.predict(image), teacher.predict(image), atol=bound + 1e-6)


def test_a_file_that_is_no_teacher_is_refused(tmp_path, network):
    with pytest.raises(CheckpointError, match="no such file"):
        load_teacher(tmp_path / "gone.safetensors")
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(b"\x10")
    with pytest.raises(CheckpointError, match="not a safetensors file, or cut short"):
        load_teacher(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="schema is None, expected 'dsgnn.teacher/1'"):
        load_teacher(path)
    teacher = Teacher([network])
    save_teacher(path, teacher)
    tensors = load_file(path)
    header = {"schema": "dsgnn.teacher/1", "members": '[{"backbone": "resnet18"}]'}
    save_file(tensors, path, header)
    with pytest.raises(CheckpointError, match="its configuration cannot be used"):
        load_teacher(path)
    members = json.dumps([{"backbone": "efficientnet_lite0", "width": 9, "prior": [9, 12],
                           "sources": ["A", "B"]}])  # fmt: skip
    save_file(tensors, path, header | {"members": members})
    with pytest.raises(CheckpointError, match="size mismatch"):
        load_teacher(path)


def test_a_backbone_of_another_kind_is_refused():
    with pytest.raises(OptionError, match="'resnet18' must be one of timm's EfficientNets"):
        GazeNetwork(GazeConfig(backbone="resnet18"))


def test_the_divergence_by_hand():
    target = torch.tensor([[[0.5, 0.5], [0, 0]], [[1, 0], [0, 0]]])
    flat = torch.full((2, 2, 2), 0.25).log()
    expected = torch.tensor([2.0, 4.0]).log()
    torch.testing.assert_close(divergence(flat, target), expected)
    own = torch.tensor([[[0.5, 0.25], [0.125, 0.125]]])
    torch.testing.assert_close(divergence(own.log(), own), torch.zeros(1), atol=1e-6, rtol=0)


def test_prepared_photos_and_their_mirror_images(folder, network):
    photos = read_gaze(folder)
    data = prepare(network, photos, blur=0.05)
    assert data.features.shape[:2] == (12, 2) and data.features.shape[3:] == (6, 8)
    assert data.sources.tolist() == [0, 1] * 6
    expected = density(photos[3], (6, 8), 0.05 * 8)
    np.testing.assert_array_equal(data.targets[3].numpy(), expected)
    with torch.no_grad():
        image = torch.from_numpy(resize(photos[3].read()[:, ::-1].copy(), 64))
        pixels = (image.float() - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor(
            [58.395, 57.12, 57.375]
        )
        mirrored = network.features(pixels.permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(data.features[3, 1].float(), mirrored, atol=2e-3, rtol=2e-3)


def test_photos_that_cannot_be_prepared_are_named(folder, network):
    photos = read_gaze(folder)
    with pytest.raises(DataError, match="no photo to prepare"):
        prepare(network, [], 0.05)
    with pytest.raises(DataError, match="unknown sources C; the network has A, B"):
        prepare(network, [replace(photos[0], source="C")], 0.05)
    cv2.imwrite(str(folder / "images" / "tall.png"), np.zeros((64, 48, 3), np.uint8))
    tall = GazePhoto(folder / "images" / "tall.png", 48, 64, "A", np.array([[3.0, 3.0]]))
    with pytest.raises(DataError, match="tall.png has 48×64 pixels, others have another shape"):
        prepare(network, [photos[0], tall], 0.05)


def test_training_brings_the_map_closer_to_the_looks(folder):
    torch.manual_seed(4)
    network = GazeNetwork(replace(TINY, dropout=0.0))
    data = prepare(network, read_gaze(folder), blur=0.05)
    optimiser = torch.optim.SGD((p for p in network.parameters() if p.requires_grad), lr=0.02)
    chosen, mirrored = torch.arange(12), torch.arange(12) % 2 == 0
    losses = []
    for _ in range(3):
        loss = train_step(network, data, chosen, mirrored)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    figures = mean_divergence(network, data)
    assert figures.keys() == {"A", "B"} and all(0 < value < 10 for value in figures.values())


def test_only_photos_that_may_be_are_learnt_from(folder, monkeypatch):
    photos = read_gaze(folder)
    splits = [gaze_split(found.path.name) for found in photos]
    assert {"train", "val"} <= set(splits)
    first = splits.index("train")
    photos[first] = replace(photos[first], dev=True)
    seen = []

    def spy(network, chosen, blur):
        seen.append([found.path.name for found in chosen])
        return prepare(network, chosen, blur)

    monkeypatch.setattr("dsgnn.teacher.training.prepare", spy)
    lines: list[str] = []
    recipe = GazeRecipe(passes=2, batch=4, blur=0.05)
    trained = train_network(TINY, recipe, photos, seed=5, say=lines.append)
    names = [found.path.name for found in photos]
    learnt = [n for i, (n, s) in enumerate(zip(names, splits, strict=True))
              if s == "train" and i != first]  # fmt: skip
    compared = [name for name, split in zip(names, splits, strict=True) if split == "val"]
    assert seen == [learnt, compared]
    assert len(lines) == 2 and lines[1].startswith("pass 2 of 2: divergence ")
    assert "on validation photos" in lines[1] and not trained.training
    again = train_network(TINY, recipe, photos, seed=5, say=lines.append)
    assert lines[2:] == lines[:2]  # the seed decides everything random
    for a, b in zip(trained.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_members_are_told_by_backbone_and_file(tmp_path):
    weights = tmp_path / "weights=1.safetensors"
    weights.write_bytes(b"")
    [(config, file)] = parse_members([f"efficientnet_lite1={weights}"], 256)
    assert (config.backbone, config.size, file) == ("efficientnet_lite1", 256, weights)
    for text in ("efficientnet_lite1", f"efficientnet_lite1={tmp_path / 'gone'}"):
        with pytest.raises(OptionError, match="must be BACKBONE=FILE with a file that exists"):
            parse_members([text], 256)


def test_the_command_trains_a_teacher(folder, tmp_path, network):
    entries = json.loads((folder / "fixations.json").read_text())["images"]
    known = [entry | {"source": "OSIE"} for entry in entries]
    (tmp_path / "fixations.json").write_text(json.dumps({"images": known}))
    (tmp_path / "images").symlink_to(folder / "images")
    weights, out = tmp_path / "lite0.safetensors", tmp_path / "teacher.safetensors"
    body = network.backbone["body"].state_dict()
    save_file({name: value.contiguous() for name, value in body.items()}, weights)
    command = ["--gaze", str(tmp_path), "--out", str(out), "--size", "64", "--passes", "1"]
    found = CliRunner().invoke(main, [*command, "--member", f"efficientnet_lite0={weights}"])
    assert found.exit_code == 0, found.output
    assert "pass 1 of 1: divergence" in found.output
    [member] = load_teacher(out).members
    stem = "backbone.body.conv_stem.weight"
    torch.testing.assert_close(
        member.state_dict()[stem], network.state_dict()[stem], atol=1e-3, rtol=1e-3
    )

    wrong = CliRunner().invoke(main, [*command, "--member", "efficientnet_lite0"])
    assert wrong.exit_code == 2 and "must be BACKBONE=FILE" in wrong.output
    (tmp_path / "fixations.json").write_text("{}")
    broken = CliRunner().invoke(main, [*command, "--member", f"efficientnet_lite0={weights}"])
    assert broken.exit_code == 1 and "has no 'images'" in broken.output
