"""The network: the published one's values, one image against many, and what learns."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from golden import arrays, published_model
from torch import nn
from torch.nn import functional as F

from dsgnn.config import Config
from dsgnn.data.transforms import ImageTruth
from dsgnn.graph import EdgeExtractor
from dsgnn.model import DSGNN, Output, build_model, normalise
from dsgnn.query_decoder import attention_mask
from dsgnn.runtime.letterbox import Geometry, LongestSide, letterbox
from dsgnn.runtime.postprocess import postprocess
from dsgnn.training.losses import Criterion


@pytest.fixture
def swin(small: Config) -> Config:
    return replace(
        small, name="small-swin", backbone="swin_tiny_patch4_window7_224", frozen_norm=False,
        backbone_options={"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)},
    )  # fmt: skip


def photos(batch: int, height: int, width: int) -> torch.Tensor:
    """Normalised images that differ, with structure of several sizes."""
    generator = torch.Generator().manual_seed(batch * height + width)
    coarse = torch.randn(batch, 3, 5, 5, generator=generator)
    fine = torch.randn(batch, 3, height, width, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic") + 0.3 * fine


def seeded(config: Config) -> DSGNN:
    torch.manual_seed(0)
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


@pytest.mark.parametrize("config", ["nano", "small", "swin"], indirect=True)
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


@pytest.mark.parametrize("config", ["nano", "small", "swin"], indirect=True)
def test_the_short_forward_equals_the_last_training_output(config):
    model, images = seeded(config), photos(2, 64, 96)
    with torch.no_grad():
        short, long = model(images), model(images, training_outputs=True)
    assert short.training is None and len(long.training.masks) == model.config.layers + 1
    for name in ("saliency", "class_logits", "masks"):
        torch.testing.assert_close(getattr(short, name), getattr(long, name), rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", ["nano", "small", "swin"], indirect=True)
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
    for name in [n for n in learning if n.endswith(("rank.bias", "rank_s.bias", "rank_t.bias"))]:
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


def test_frozen_norms_stay_as_loaded_in_training(small):
    model = seeded(small).train()
    assert model.training and model.shape.training
    before = {n: v.clone() for n, v in model.state_dict().items() if "running" in n}
    model(photos(2, 64, 64))
    after = model.state_dict()
    assert before
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_norms_follow_the_images_in_training(small):
    model = seeded(replace(small, frozen_norm=False)).train()
    statistics = model.backbone.body.bn1.running_mean.clone()
    model(photos(2, 64, 64))
    assert not torch.equal(statistics, model.backbone.body.bn1.running_mean)


def test_dropout_is_off_at_inference(swin):
    model, images = seeded(swin), photos(1, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images).saliency, model(images).saliency)
        model.train()
        assert not torch.equal(model(images).saliency, model(images).saliency)


@pytest.mark.parametrize("config", ["nano", "small"], indirect=True)
def test_autocast_stays_close(config):
    model, images = seeded(config), photos(2, 64, 96)
    centres = torch.arange(model.config.queries).expand(2, -1)  # near ties between peaks may fall
    with torch.no_grad():
        exact = model(images, training_outputs=True, centres=centres)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images, training_outputs=True, centres=centres)
    assert rough.saliency.isfinite().all() and rough.masks.isfinite().all()
    torch.testing.assert_close(rough.score.float(), exact.score, rtol=0, atol=0.1)


def test_both_branches_look_where_the_shapes_are(small):
    """The texture stack attends with the shape branch's masks, before every layer."""
    model, images = seeded(small), photos(1, 64, 64)
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
