"""Published checkpoints become ours, whole and only when all of it fits; and the zoo."""

import json
import os
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from golden import shapes
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsgnn import cli
from dsgnn.config import CONFIGS, ZOO, Weights, config_from_dict, zoo_table
from dsgnn.model import build_model
from dsgnn.runtime.artifact import sha256_of
from dsgnn.runtime.errors import CheckpointError
from dsgnn.weights.checkpoint import (
    SCHEMA,
    convert,
    infer_config,
    load_checkpoint,
    load_upstream,
    save_checkpoint,
    upstream_name,
)

SMALL = replace(
    CONFIGS["r50-assr"], name="small", backbone="resnet18", width=32, encoder_layers=1, layers=1,
    feedforward=32, backbone_options={"channels": (8, 16, 24, 32), "layers": (1, 1, 1, 1)},
)  # fmt: skip
PUBLISHED = [name for name in CONFIGS if name != "nano"]


# --- names and shapes of the ten published configurations ---------------------------------------


def published_names(config: str) -> dict[str, torch.Tensor]:
    """A published checkpoint of any configuration, without numbers (device "meta").

    Known are those of R50 and Swin-L; Swin-T, -S and -B differ from Swin-L in depth and widths.
    """
    backbone, _, data = config.rpartition("-")
    if backbone in ("r50", "swin-l"):
        known = shapes(config)
    else:
        width, depth, heads, window = {
            "swin-t": (96, 6, 3, 7), "swin-s": (96, 18, 3, 7), "swin-b": (128, 18, 4, 12),
        }[backbone]  # fmt: skip
        known = {}
        for name, shape in shapes(f"swin-l-{data}").items():
            block = re.match(r"backbone\.stages\.2\.blocks\.(\d+)", name)
            if block and int(block[1]) >= depth:
                continue
            if (
                name.startswith("backbone.")
                or "_convs.0.conv.weight" in name
                or "input_convs" in name
            ):
                stage = re.match(r"backbone\.stages\.(\d)", name)
                if name.endswith("relative_position_bias_table"):
                    shape = ((2 * window - 1) ** 2, heads * 2 ** int(stage[1]))
                elif not name.endswith("relative_position_index"):  # multiples of Swin-L's 192
                    shape = tuple(n * width // 192 if n % 192 == 0 else n for n in shape)
            known[name] = shape
    return {name: torch.empty(shape, device="meta") for name, shape in known.items()}


@pytest.mark.parametrize("config", PUBLISHED)
def test_each_published_form_is_recognised_and_loads(config):
    state = published_names(config)
    assert infer_config(state) is CONFIGS[config]
    with torch.device("meta"):
        model = build_model(config)
    load_upstream(model, state)


def test_what_does_not_fit_is_listed_and_changes_nothing():
    with torch.device("meta"):
        model = build_model("r50-assr")
    state = published_names("r50-assr")
    del state["panoptic_head.rank_head.rank_head_final.bias"]
    state["panoptic_head.rank_head.extra.weight"] = torch.empty(3)
    state["backbone.conv1.weight"] = torch.empty(64, 3, 3, 3)
    gather = "panoptic_head.rank_head.gnn_sep.enc.global_layer.gfe1.weight"
    state[gather] = torch.empty(128, 32)  # not even the dimensions that are to be reordered
    with pytest.raises(CheckpointError) as caught:
        load_upstream(model, state)
    assert str(caught.value).split("; ") == [
        "not a published r50-assr checkpoint",
        "missing (1): graph.rank.bias",
        "unexpected (1): panoptic_head.rank_head.extra.weight",
        "mis-shaped (2): backbone.conv1.weight (64, 3, 3, 3) gives (64, 3, 3, 3), not "
        f"(64, 3, 7, 7), {gather} (128, 32) gives (128, 32), not (128, 160)",
    ]


def test_a_failed_load_leaves_the_model_as_it_was():
    model = build_model(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"not a published small checkpoint; unexpected \(\d+\)"
    ):
        load_upstream(model, published_names("r50-assr"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_names_for_one_parameter_are_refused():
    with torch.device("meta"):
        model = build_model("r50-assr")
    state = published_names("r50-assr")
    state["graph.rank.bias"] = torch.empty(1)  # our name, beside upstream's
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): graph.rank.bias$"):
        load_upstream(model, state)


def test_unknown_shapes_name_what_was_found():
    state = published_names("swin-l-assr")
    state["panoptic_head.structure_query_feat.weight"] = torch.empty(7, 256)
    with pytest.raises(
        CheckpointError, match="width 192 with 18 blocks .* and 7 queries; name its"
    ):
        infer_config(state)
    with pytest.raises(CheckpointError, match="no DSGNN checkpoint.*the file holds a, b, c …"):
        infer_config(dict.fromkeys("abcd", torch.empty(1)))
    with pytest.raises(CheckpointError, match="the file holds nothing"):
        infer_config({})


# --- conversion ----------------------------------------------------------------------------------


def test_a_published_file_converts(tmp_path, monkeypatch):
    """Each parameter has its number for a value, so that they cannot be mixed up."""
    names = shapes("r50-assr")
    state = {
        name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(names.items())
    }
    path = tmp_path / "upstream.pth"
    torch.save({"meta": {}, "state_dict": state}, path, _use_new_zipfile_serialization=False)
    target = tmp_path / "model.safetensors"
    done = CliRunner().invoke(cli.convert, [str(path), "-o", str(target)])
    assert done.exit_code == 0, done.output
    size = f"{target.stat().st_size / 1e6:.0f} MB"
    assert done.output == f"{target}: r50-assr, converted, origin unknown, {size}\n"
    converted = load_file(target)
    assert len(converted) == len(state)
    for i, name in enumerate(state):
        assert (converted.pop(upstream_name(name)) == i).all(), name
    with safe_open(target, "pt") as file:
        assert file.metadata()["weights"] == "converted"
        assert json.loads(file.metadata()["config"])["name"] == "r50-assr"
    known = Weights("r50-assr", "ASSR", 0.716, "here", "", sha256_of(path))
    monkeypatch.setattr("dsgnn.weights.checkpoint.ZOO", (known,))
    done = CliRunner().invoke(cli.convert, [str(path), "-o", str(target)])
    assert done.output == f"{target}: r50-assr, published, {size}\n"
    assert load_checkpoint(target)[1] == "published"


def test_equal_tensors_give_equal_files(tmp_path):
    """The library writes metadata in the order of a hash table, another one each time."""
    path, again = tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    model = build_model(SMALL)
    save_checkpoint(path, model)
    loaded, _ = load_checkpoint(path)
    for _ in range(10):
        save_checkpoint(again, loaded)
        assert sha256_of(again) == sha256_of(path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0
    for name, value in load_file(path).items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_named_configuration_must_fit(tmp_path):
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes("r50-assr").items()}
    path = tmp_path / "upstream.pth"
    torch.save({"state_dict": state}, path)
    target = tmp_path / "model.safetensors"
    done = CliRunner().invoke(cli.convert, [str(path), "-o", str(target), "--config", "r50-irsr"])
    assert done.exit_code == 1 and not target.exists()
    assert "not a published r50-irsr checkpoint; mis-shaped" in done.output
    assert "structure_query_feat.weight (5, 256) gives (5, 256), not (8, 256)" in done.output


# --- our own checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["nano", SMALL], ids=["nano", "small"])
def test_our_checkpoints_come_back_equal(config, tmp_path):
    model, path = build_model(config), tmp_path / "model.safetensors"
    model.train()
    save_checkpoint(path, model, weights="synthetic")
    loaded, weights = load_checkpoint(path)
    assert weights == "synthetic" and loaded.config == model.config and not loaded.training
    state = model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert path.stat().st_mode & 0o444 == 0o444 & ~os.umask(os.umask(0))  # others may read it


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_survive_json(name):
    config = CONFIGS[name]
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_configurations_of_other_versions():
    values = CONFIGS["nano"].to_dict()
    older = {**CONFIGS["r50-irsr"].to_dict()}
    del older["rank_loss"], older["backbone_options"]  # fields with a default may come later
    assert config_from_dict(older) == CONFIGS["r50-irsr"]
    with pytest.raises(ValueError, match="the configuration has no queries, size"):
        config_from_dict({k: v for k, v in values.items() if k not in ("size", "queries")})
    with pytest.raises(ValueError, match="unknown fields in the configuration: wings; was this"):
        config_from_dict({**values, "wings": 2})


def test_what_is_not_our_checkpoint(tmp_path):
    path, model = tmp_path / "model.safetensors", build_model(SMALL)
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(path)
    torch.save({"state_dict": model.state_dict()}, path)
    with pytest.raises(CheckpointError, match="not a safetensors .* converted with dsgnn-convert"):
        load_checkpoint(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="schema is None, expected 'dsgnn.checkpoint/1'"):
        load_checkpoint(path)
    header = {"schema": SCHEMA, "weights": "trained"}
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    config = json.dumps(SMALL.to_dict())
    save_file(tensors, path, metadata={**header, "schema": "dsgnn.checkpoint/9", "config": config})
    with pytest.raises(CheckpointError, match="schema is 'dsgnn.checkpoint/9', expected"):
        load_checkpoint(path)
    save_file(tensors, path, metadata=header)
    with pytest.raises(CheckpointError, match="its header has no config"):
        load_checkpoint(path)
    fetching = {**SMALL.backbone_options, "pretrained_cfg": {"url": "http://nowhere.invalid/x"}}
    changes = ({"seeds": "new"}, {"frozen": ["nothing"]}, {"backbone_options": fetching})
    changed = [json.dumps({**SMALL.to_dict(), **change}) for change in changes]
    for text in ("{", "[]", '{"name": "x"}', *changed):
        save_file(tensors, path, metadata={**header, "config": text})
        with pytest.raises(CheckpointError, match=re.escape(f"{path}: its configuration")):
            load_checkpoint(path)
    del tensors["graph.rank.bias"]
    save_file(tensors, path, metadata={**header, "config": config})
    with pytest.raises(CheckpointError, match='Missing key.*"graph.rank.bias"'):
        load_checkpoint(path)


def test_a_truncated_checkpoint_of_ours(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build_model(SMALL))
    whole = path.read_bytes()
    for share in (0, 0.01, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CheckpointError, match="not a safetensors file, or cut short"):
            load_checkpoint(path)


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path, model = tmp_path / "model.safetensors", build_model(SMALL)
    save_checkpoint(path, model)
    before = path.read_bytes()

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, build_model(SMALL))
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]


def test_only_known_sources_of_weights(tmp_path):
    with pytest.raises(ValueError, match="weights must be one of trained, published"):
        save_checkpoint(tmp_path / "model.safetensors", build_model(SMALL), weights="good")
    assert not os.listdir(tmp_path)


# --- the command and the zoo --------------------------------------------------------------------


def test_wrong_use_of_the_command(tmp_path):
    source = tmp_path / "upstream.pth"
    source.write_bytes(b"x")

    def wrong(*args) -> str:
        done = CliRunner().invoke(cli.convert, [str(arg) for arg in args])
        assert done.exit_code == 2
        return done.output

    assert "'none.pth' does not exist" in wrong("none.pth", "-o", "x.safetensors")
    assert "must end in .safetensors, got x.pth" in wrong(source, "-o", tmp_path / "x.pth")
    nowhere = tmp_path / "no" / "x.safetensors"
    assert f"there is no folder {nowhere.parent} to write {nowhere.name} in" in wrong(
        source, "-o", nowhere
    )
    named = wrong(source, "-o", tmp_path / "x.safetensors", "--config", "nano")
    assert "'nano' is not one of 'r50-assr', 'r50-irsr', 'swin-t-assr'" in named
    torch.save({"a": torch.ones(1)}, source)
    with pytest.raises(ValueError, match="unknown configuration 'r51'"):
        convert(source, tmp_path / "x.safetensors", "r51")


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dsgnn.weights.checkpoint", None)
    source = tmp_path / "upstream.pth"
    source.write_bytes(b"x")
    done = CliRunner().invoke(cli.convert, [str(source), "-o", str(tmp_path / "x.safetensors")])
    assert done.exit_code == 2 and "is not installed: pip install 'dsgnn[train]'" in done.output


def test_the_zoo_is_about_configurations_there_are():
    assert [w.config for w in ZOO] == ["nano", "r50-assr", "r50-irsr", "swin-l-assr", "swin-l-irsr"]
    for weights in ZOO:
        assert weights.config in CONFIGS
        if weights.sa_sor is not None:
            assert weights.config.endswith(weights.data.lower())
            command = weights.convert.split()
            options = cli.convert.make_context(command[0], ["setup.cfg", *command[2:]])
            assert options.params["out"].stem == weights.config
    published = {w.config: w.sa_sor for w in ZOO if w.sa_sor is not None}
    assert published == {
        "r50-assr": 0.716, "r50-irsr": 0.569, "swin-l-assr": 0.761, "swin-l-irsr": 0.607,
    }  # fmt: skip


def test_the_readme_shows_the_zoo():
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")
    shown = re.findall(r"<!-- zoo -->\n(.*?)\n<!-- /zoo -->", page, re.DOTALL)
    assert [table.strip() for table in shown] == [zoo_table()], (
        "paste what `python -c 'from dsgnn.config import zoo_table; print(zoo_table())'` prints"
    )


def test_the_converted_file_has_no_other_content(tmp_path):
    """Metadata of ours only, and exactly the network's tensors."""
    path, model = tmp_path / "model.safetensors", build_model(SMALL)
    save_checkpoint(path, model)
    assert set(load_file(path)) == set(model.state_dict())
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert set(header["__metadata__"]) == {"schema", "weights", "config"}
