"""The network against the published one, its parts against naive versions, and its habits."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import timm
import torch
from golden import arrays, published_model
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from torch.nn import functional as F

from dsgnn.backbone import PadThenShiftBlock
from dsgnn.config import CONFIGS, Config, get_config
from dsgnn.data.transforms import ImageTruth
from dsgnn.graph import EdgeExtractor
from dsgnn.model import DSGNN, Output, build_model, normalise
from dsgnn.pixel_decoder import HEADS, MSDA, POINTS, cell_centres, sine_position
from dsgnn.query_decoder import PeakSeeds, attention_mask, shape_masks, texture_maps
from dsgnn.runtime.letterbox import Geometry, LongestSide, letterbox
from dsgnn.runtime.postprocess import postprocess
from dsgnn.training.losses import Criterion

SMALL = replace(
    CONFIGS["r50-assr"], name="small", backbone="resnet18", width=32, encoder_layers=2, layers=3,
    feedforward=64, backbone_options={"channels": (8, 16, 24, 32), "layers": (1, 1, 1, 1)},
)  # fmt: skip
SMALL_SWIN = replace(
    SMALL, name="small-swin", backbone="swin_tiny_patch4_window7_224", frozen_norm=False,
    backbone_options={"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)},
)  # fmt: skip


def photos(batch: int, height: int, width: int) -> torch.Tensor:
    """Normalised images that differ, with structure of several sizes."""
    generator = torch.Generator().manual_seed(batch * height + width)
    coarse = torch.randn(batch, 3, 5, 5, generator=generator)
    fine = torch.randn(batch, 3, height, width, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic") + 0.3 * fine


def seeded(config: Config | str, seed: int = 0) -> DSGNN:
    torch.manual_seed(seed)
    return build_model(config)


# --- the published network's values -------------------------------------------------------------

FORWARD = [
    ("r50-assr", 4),
    ("r50-assr", 7),
    ("r50-irsr", 5),
    pytest.param(("swin-l-assr", 2), marks=pytest.mark.slow),
]


@dataclass
class Forward:
    """One photo through preprocessing, network and postprocessing, beside the golden values."""

    golden: dict[str, np.ndarray]
    images: torch.Tensor
    geometry: Geometry
    model: DSGNN
    maps: list[torch.Tensor]
    pixels: torch.Tensor
    memory: list[torch.Tensor]
    output: Output


@pytest.fixture(scope="module", params=FORWARD, ids="{0[0]}-{0[1]}".format)
def forward(request: pytest.FixtureRequest) -> Forward:
    config, seed = request.param
    golden = arrays(f"forward_{config.replace('-l', 'l').replace('-', '_')}_{seed}")
    model = published_model(config, seed)
    padded, geometry = letterbox(golden["image"], LongestSide(model.config.size))
    images = normalise(torch.from_numpy(padded)[None])
    seen = {}
    hooks = [
        part.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name, part in (("maps", model.backbone), ("decoded", model.pixel_decoder))
    ]
    with torch.no_grad():
        output = model(images, training_outputs=True)
    for hook in hooks:
        hook.remove()
    pixels, memory = seen["decoded"]
    return Forward(golden, images, geometry, model, seen["maps"], pixels, memory, output)


def test_preprocessing_equals_the_published(forward):
    assert forward.geometry.resized == tuple(forward.golden["img_shape"][:2])
    assert forward.geometry.original == tuple(forward.golden["ori_shape"][:2])
    if "input" in forward.golden:
        np.testing.assert_allclose(forward.images[0], forward.golden["input"], rtol=0, atol=1e-4)
    else:
        assert forward.model.config.name == "swin-l-assr"


def test_every_array_equals_the_published(forward):
    training, graph = forward.output.training, forward.output.training.graph
    ours = {"mask_feature": forward.pixels[0, ::16, ::4, ::4]}
    for i, (x, step) in enumerate(zip(forward.maps, (4, 2, 1, 1), strict=True)):
        ours[f"feat{i}"] = x[0, :: max(1, x.shape[1] // 16), ::step, ::step]
    for i, x in enumerate(forward.memory):
        ours[f"memory{i}"] = x[0, ::16]
    for i in (0, 4, 9):
        ours[f"shape_cls_{i}"] = training.class_s[i, 0]
    for i in (0, 9):
        ours[f"shape_mask_{i}"] = training.masks[i, 0]
    ours["shape_rank_9"] = training.rank_s[9, 0]
    ours["texture_cls_9"] = training.class_t[9, 0]
    ours["texture_rank_9"] = training.rank_t[9, 0]
    ours["texture_mask_9"] = training.textures[9, 0, :, :, ::2, ::2]
    ours["rank_pred"], ours["cls_pred"] = forward.output.saliency[0], forward.output.class_logits[0]
    ours["rank_pred_0"], ours["cls_pred_0"] = graph.rank[0], graph.class_logits[0]
    ours["rank_pred_shape"], ours["rank_pred_texture"] = graph.rank_s[9], graph.rank_t[9]
    about_the_photo = {"image", "input", "img_shape", "ori_shape"}
    final = {"final_scores", "final_ranks", "final_masks", "final_mask_shape"}
    assert set(ours) == set(forward.golden) - about_the_photo - final
    for name, value in ours.items():
        tolerance = 1e-3 if name.startswith(("shape_mask", "texture_mask")) else 1e-4
        np.testing.assert_allclose(value, forward.golden[name], 0, tolerance, err_msg=name)


def test_the_user_gets_the_published_ranking(forward):
    golden, output = forward.golden, forward.output
    ranking = postprocess(
        output.saliency[0].numpy(), output.score[0].numpy(), output.masks[0].numpy(),
        forward.geometry, forward.model.config.threshold, if_none="all",
    )  # fmt: skip
    found = sorted(ranking.objects, key=lambda o: o.query)  # upstream keeps the query order
    n, h, w = golden["final_mask_shape"]
    assert len(found) == n == len(golden["final_ranks"])
    assert [n + 1 - o.rank for o in found] == golden["final_ranks"].tolist()
    np.testing.assert_allclose([o.saliency for o in found], golden["final_scores"], 0, 1e-4)
    masks = np.unpackbits(golden["final_masks"])[: n * h * w].reshape(n, h, w).astype(bool)
    for item, mask in zip(found, masks, strict=True):
        different = int((item.mask ^ mask).sum())
        iou = (item.mask & mask).sum() / (item.mask | mask).sum()
        assert different <= 50 or iou >= 0.999, (item.rank, different, iou)


# --- shapes, batches, gradients -----------------------------------------------------------------


@pytest.mark.parametrize("config", ["nano", SMALL, SMALL_SWIN], ids=["nano", "small", "swin"])
@pytest.mark.parametrize("size", [(64, 96), (128, 32)])
def test_a_batch_equals_its_images_one_by_one(config, size):
    model = seeded(config)
    assert not model.training
    images = photos(3, *size)
    with torch.no_grad():
        together = model(images)
        alone = [model(image[None]) for image in images]
    B, Q, (H, W) = 3, model.config.queries, size
    assert together.saliency.shape == together.score.shape == (B, Q)
    assert together.class_logits.shape == (B, Q, 2)
    assert together.masks.shape == (B, Q, H // 4, W // 4)
    assert ((together.score > 0) & (together.score < 1)).all()
    for name in ("saliency", "class_logits", "masks"):
        expected = torch.cat([getattr(one, name) for one in alone])
        torch.testing.assert_close(getattr(together, name), expected, rtol=0, atol=2e-5)
        spread = (expected - expected[:1]).abs().max()
        assert spread > 1e-3, f"{name} does not depend on the image"


@pytest.mark.parametrize("config", ["nano", SMALL, SMALL_SWIN], ids=["nano", "small", "swin"])
def test_the_short_forward_equals_the_last_training_output(config):
    model, images = seeded(config), photos(2, 64, 96)
    with torch.no_grad():
        short, long = model(images), model(images, training_outputs=True)
    assert short.training is None and len(long.training.masks) == model.config.layers + 1
    for name in ("saliency", "class_logits", "masks"):
        torch.testing.assert_close(getattr(short, name), getattr(long, name), rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", ["nano", SMALL, SMALL_SWIN], ids=["nano", "small", "swin"])
def test_every_parameter_learns(config):
    """But for the query and key projections of the attentions over one key, and the biases of
    ranks: only differences of ranks count."""
    model = seeded(config).train()
    with torch.no_grad():  # some start at zero and hold the gradient of others back
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    images = photos(2, 96, 96)
    masks = torch.zeros(2, 3, 96, 96)
    masks[:, 0, :40, :40], masks[:, 1, 50:, :48], masks[:, 2, 20:80, 60:] = 1, 1, 1
    masks[1] = masks[1].flip(-1)
    looks = torch.eye(12) / 12
    targets = [ImageTruth(m, torch.tensor([2.0, 1.0, 3.0]), attention=looks) for m in masks]
    terms = Criterion(model.config, points=256)(
        model(images, training_outputs=True), images, targets
    )
    sum(term.sum() for term in terms.values()).backward()
    constant_key = {
        f"{name}.{part}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, EdgeExtractor)
        for part in ("node_attention", "edge_attention")
        for kind in ("in_proj_weight", "in_proj_bias")
    }
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert constant_key < set(learning)
    for name in constant_key:
        grad = learning.pop(name).grad
        C = len(grad) // 3
        noise, value = grad[: 2 * C].abs().max(), grad[2 * C :].abs().max()  # query and key, value
        assert 1e-5 * value >= noise and value > 0, name
    for name in [
        n for n in learning if n.rpartition(".")[0].endswith(("rank", "rank_s", "rank_t"))
    ]:
        if name.endswith("bias"):
            assert learning.pop(name).grad.abs().max() < 1e-5, name
    still = [n for n, p in learning.items() if p.grad is None or p.grad.abs().max() == 0]
    assert still == []
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    norms = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and name.startswith("backbone.")
        for kind in ("weight", "bias")
    }
    parts = {
        n for n, _ in model.named_parameters()
        if n.startswith(tuple(f"backbone.body.{part}." for part in model.config.frozen))
    }  # fmt: skip
    assert frozen == (norms if model.config.frozen_norm else set()) | parts


def test_frozen_norms_stay_as_loaded_in_training():
    model = seeded(SMALL).train()
    assert model.training and model.shape.training
    before = {n: v.clone() for n, v in model.state_dict().items() if "running" in n}
    model(photos(2, 64, 64))
    after = model.state_dict()
    assert before
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_norms_follow_the_images_in_training():
    model = seeded(replace(SMALL, frozen_norm=False)).train()
    statistics = model.backbone.body.bn1.running_mean.clone()
    model(photos(2, 64, 64))
    assert not torch.equal(statistics, model.backbone.body.bn1.running_mean)


def test_dropout_is_off_at_inference():
    model, images = seeded(SMALL_SWIN), photos(1, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images).saliency, model(images).saliency)
        model.train()
        assert not torch.equal(model(images).saliency, model(images).saliency)


@pytest.mark.parametrize("config", ["nano", SMALL], ids=["nano", "small"])
def test_autocast_stays_close(config):
    model, images = seeded(config), photos(2, 64, 96)
    centres = torch.arange(model.config.queries).expand(2, -1)  # near ties between peaks may fall
    with torch.no_grad():
        exact = model(images, training_outputs=True, centres=centres)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images, training_outputs=True, centres=centres)
    assert rough.saliency.isfinite().all() and rough.masks.isfinite().all()
    torch.testing.assert_close(rough.score.float(), exact.score, rtol=0, atol=0.1)


# --- configurations and backbones ---------------------------------------------------------------


def test_the_published_configurations():
    names = [f"{b}-{d}" for b in ("r50", "swin-t", "swin-s", "swin-b", "swin-l")
             for d in ("assr", "irsr")]  # fmt: skip
    assert sorted(CONFIGS) == sorted(["nano", *names])
    table = {  # design: S, Q, threshold, class weights, augmentation
        "r50-assr": (576, 5, 0.4, (0.1, 1.0), "jitter"),
        "r50-irsr": (640, 8, 0.75, (1.0, 0.1), "flip"),
        "swin-l-assr": (640, 5, 0.75, (0.1, 1.0), "jitter"),
        "swin-l-irsr": (640, 8, 0.75, (1.0, 0.1), "flip"),
    }
    for name, expected in table.items():
        c = CONFIGS[name]
        assert (c.size, c.queries, c.threshold, c.class_weights, c.augmentation) == expected
        assert c.frozen_norm == name.startswith("r50")
    assert CONFIGS["swin-l-assr"].backbone_options["drop_path_rate"] == 0.3


def test_unknown_names_and_values_are_named():
    with pytest.raises(
        ValueError, match="unknown configuration 'r51'; choose one of nano, r50-assr"
    ):
        build_model("r51")
    assert get_config(SMALL) is SMALL
    with pytest.raises(ValueError, match="config small: seeds must be one of learned, peaks"):
        replace(SMALL, seeds="random")
    with pytest.raises(ValueError, match="seeds='peaks' needs texture=False"):
        replace(SMALL, seeds="peaks")
    with pytest.raises(ValueError, match="width must be a multiple of 32, got 40"):
        replace(SMALL, width=40)
    with pytest.raises(ValueError, match="'resnet5' is not a timm model"):
        build_model(replace(SMALL, backbone="resnet5", backbone_options={}))


@pytest.mark.parametrize(
    "name", ["convnext_atto", "mobilenetv3_small_050", "swinv2_tiny_window8_256", "regnetx_002"]
)
def test_any_timm_backbone_by_name(name):
    model = seeded(replace(SMALL, backbone=name, backbone_options={}))
    images = photos(1, 64, 96)
    with torch.no_grad():
        maps, output = model.backbone(images), model(images)
    assert [tuple(x.shape[1:]) for x in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(model.backbone.channels, (4, 8, 16, 32), strict=True)
    ]
    assert output.masks.shape == (1, 5, 16, 24)


@pytest.mark.parametrize("option", ["pretrained", "pretrained_cfg", "checkpoint_path"])
def test_no_option_of_a_backbone_loads_weights(option):
    """A checkpoint's header holds its configuration: opening one must read no other file."""
    with pytest.raises(ValueError, match=rf"must not load weights, got {option}: give a training"):
        build_model(replace(SMALL, backbone_options={**SMALL.backbone_options, option: "x"}))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_a_backbone_of_other_strides_is_refused(name):
    options = {"output_stride": 16} if name == "resnet18" else {}
    with pytest.raises(ValueError, match=f"backbone {name} has strides .*4, 8, 16 and 32"):
        build_model(replace(SMALL, backbone=name, backbone_options=options))


# --- parts against their naive versions ---------------------------------------------------------


def test_swin_pads_before_it_shifts():
    torch.manual_seed(0)
    ours = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, always_partition=True,
        strict_img_size=False, embed_dim=8, depths=(2,), num_heads=(2,), out_indices=(0,),
    )  # fmt: skip
    block = next(
        m for m in ours.modules() if isinstance(m, SwinTransformerBlock) and any(m.shift_size)
    )
    fits, odd = torch.randn(2, 14, 21, 8), torch.randn(2, 10, 9, 8)
    nn.init.normal_(block.attn.relative_position_bias_table)
    nn.init.normal_(block.attn.qkv.weight)
    expected, other = block._attn(fits), block._attn(odd)
    block.__class__ = PadThenShiftBlock
    torch.testing.assert_close(block._attn(fits), expected)  # nothing to pad: timm's
    assert (block._attn(odd) - other).abs().max() > 1e-2  # padding: timm rolls first
    # naive: pad, roll, attend window by window with a mask between regions, roll back, crop
    H, W, shift = 14, 14, block.shift_size[0]
    region = torch.zeros(H, W, dtype=torch.long)
    for i, rows in enumerate((slice(0, -7), slice(-7, -shift), slice(-shift, None))):
        for j, columns in enumerate((slice(0, -7), slice(-7, -shift), slice(-shift, None))):
            region[rows, columns] = 3 * i + j
    x = F.pad(odd, (0, 0, 0, W - 9, 0, H - 10)).roll((-shift, -shift), (1, 2))
    out = torch.zeros_like(x)
    for top in range(0, H, 7):
        for left in range(0, W, 7):
            at = (slice(top, top + 7), slice(left, left + 7))
            labels = region[at].flatten()
            mask = torch.where(labels[:, None] == labels, 0.0, -100.0)
            window = block.attn(x[:, at[0], at[1]].reshape(2, 49, 8), mask=mask[None])
            out[:, at[0], at[1]] = window.view(2, 7, 7, 8)
    out = out.roll((shift, shift), (1, 2))[:, :10, :9]
    torch.testing.assert_close(block._attn(odd), out)


def test_msda_equals_a_loop_over_points():
    torch.manual_seed(1)
    C, shapes = 16, [(2, 3), (3, 5), (6, 7)]
    layer = MSDA(C)
    nn.init.normal_(layer.sampling_offsets.weight, std=0.5)
    nn.init.normal_(layer.attention_weights.weight)
    N = sum(h * w for h, w in shapes)
    query, x = torch.randn(2, N, C), torch.randn(2, N, C)
    centres = torch.cat([cell_centres(h, w, x) for h, w in shapes])
    with torch.no_grad():
        fast = layer(query, x, centres, shapes)
        offsets = layer.sampling_offsets(query).view(2, N, HEADS, 3, POINTS, 2)
        weights = layer.attention_weights(query).view(2, N, HEADS, 12).softmax(-1)
        value = layer.value_proj(x).view(2, N, HEADS, C // HEADS)
        slow = torch.zeros(2, N, HEADS, C // HEADS)
        outside = 0
        for b, n, m in np.ndindex(2, N, HEADS):
            start = 0
            for level, (h, w) in enumerate(shapes):
                for p in range(POINTS):
                    dx, dy = offsets[b, n, m, level, p].tolist()
                    px, py = (
                        centres[n, 0].item() * w + dx - 0.5,
                        centres[n, 1].item() * h + dy - 0.5,
                    )
                    left, top = int(np.floor(px)), int(np.floor(py))
                    for i, j in (
                        (top, left),
                        (top, left + 1),
                        (top + 1, left),
                        (top + 1, left + 1),
                    ):
                        share = (1 - abs(px - j)) * (1 - abs(py - i))
                        if 0 <= i < h and 0 <= j < w:
                            cell = value[b, start + i * w + j, m]
                            slow[b, n, m] += weights[b, n, m, 4 * level + p] * share * cell
                        else:
                            outside += share > 0.1
                start += h * w
        slow = layer.output_proj(slow.flatten(2))
    assert outside > 100  # zeros outside are part of it
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)


def test_sine_position_by_its_formula():
    position = sine_position(3, 5, 32, torch.zeros(1))
    assert position.shape == (32, 3, 5)
    for c, y, x in ((0, 0, 0), (1, 2, 4), (7, 1, 3), (16, 2, 1), (31, 0, 4), (22, 1, 0)):
        k, (i, n) = c % 16, (y, 3) if c < 16 else (x, 5)  # y first
        angle = (i + 1) / (n + 1e-6) * 2 * np.pi / 10000 ** (2 * (k // 2) / 16)
        expected = np.sin(angle) if k % 2 == 0 else np.cos(angle)
        assert position[c, y, x].item() == pytest.approx(expected, abs=1e-5)


def test_texture_maps_as_upstream_describes_them():
    """Repeat E three times along the channels, regroup to (C, 3), sum over C."""
    torch.manual_seed(2)
    for C in (32, 96, 256):  # 96: several channels meet, 3 divides C
        e, E = torch.randn(2, 4, C), torch.randn(2, C, 3, 5)
        literal = E.repeat(1, 3, 1, 1).view(2, C, 3, 3, 5)
        expected = torch.einsum("bqc,bcrhw->bqrhw", e, literal)
        torch.testing.assert_close(texture_maps(e, E), expected, rtol=1e-4, atol=1e-4)
    stacked = texture_maps(e.expand(6, 2, 4, C), E)  # decoder outputs in front
    torch.testing.assert_close(stacked[3], texture_maps(e, E))
    torch.testing.assert_close(shape_masks(e.expand(6, 2, 4, C), E)[5], shape_masks(e, E))


def test_attention_mask_opens_rows_that_are_blocked_everywhere():
    logits = torch.full((1, 4, 4, 4), -1.0)
    logits[0, 0, :2] = 3.0  # sees the upper half
    logits[0, 1, 0, 0] = 0.1  # one weak pixel: lost when resized
    logits[0, 2] = 2.0  # sees everything
    logits[0, 3, :, :2] = 0.0  # sigmoid 0.5 is not below 0.5
    blocked = attention_mask(logits, (2, 2))
    assert blocked.dtype == torch.bool and blocked.shape == (1, 4, 4)
    assert blocked[0].tolist() == [
        [False, False, True, True],
        [False, False, False, False],
        [False, False, False, False],
        [False, True, False, True],
    ]


def test_both_branches_look_where_the_shapes_are():
    """The texture stack attends with the shape branch's masks, before every layer."""
    model, images = seeded(SMALL), photos(1, 64, 64)
    seen = []
    for branch in (model.shape, model.texture):
        for layer in branch.layers:
            layer.register_forward_pre_hook(
                lambda _, args: seen.append((args[2].shape[1], args[4]))
            )
    with torch.no_grad():
        output = model(images, training_outputs=True)
    levels, masks = zip(*seen, strict=True)
    assert levels == (4, 4, 16, 16, 64, 64)  # strides 32, 16, 8
    for i in range(3):
        side = 2 ** (i + 1)
        expected = attention_mask(output.training.masks[i], (side, side))
        assert torch.equal(masks[2 * i], expected) and torch.equal(masks[2 * i + 1], expected)


def test_queries_start_from_the_highest_peaks():
    seeds = PeakSeeds(3, 32).eval()
    memory = torch.zeros(1, 32, 16, 16)
    heat = torch.full((1, 1, 16, 16), -5.0)
    heat[0, 0, 3, 4], heat[0, 0, 3, 5], heat[0, 0, 12, 2], heat[0, 0, 8, 14] = 4.0, 3.0, 2.0, 1.0
    memory[0, 0] = torch.arange(256.0).view(16, 16)  # a cell's feature tells where it is
    seeds.heat = nn.Sequential(_Fixed(heat))
    seeds.feature = nn.Identity()
    features, position, logits, cells = seeds(memory)
    assert cells.tolist() == [[3 * 16 + 4, 12 * 16 + 2, 8 * 16 + 14]]  # (3, 5) is no peak
    assert features[0, :, 0].tolist() == [52.0, 194.0, 142.0]
    torch.testing.assert_close(position[0, 1], sine_position(16, 16, 32, memory)[:, 12, 2])
    assert torch.equal(logits, heat[:, 0])
    # true centres come first, and silence the peaks around them: (3, 4) = 52 is next to 69
    forced = seeds(memory, torch.tensor([[7, -1, 69]]))[3]
    assert sorted(forced[0, :2].tolist()) == [7, 69] and forced[0, 2] == 12 * 16 + 2


def test_where_peaks_are_few_the_next_cells_follow_in_their_order():
    seeds = PeakSeeds(4, 32).eval()
    ramp = torch.arange(256.0).view(1, 1, 16, 16) * 1e-4  # its one peak is the last cell
    seeds.heat = nn.Sequential(_Fixed(ramp))
    assert seeds(torch.zeros(1, 32, 16, 16))[3].tolist() == [[255, 254, 253, 252]]


class _Fixed(nn.Module):
    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value
