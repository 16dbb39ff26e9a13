"""Cut-outs pasted on a canvas: exact visible masks, shadows, and what the frame cuts."""

import cv2
import numpy as np

from dsgnn.scenes.material import Cutout, premultiplied
from dsgnn.scenes.paint import Layer, flatten, make_layer

RED, GREEN = (220, 30, 30), (30, 200, 60)


def test_layers_paste_exactly_and_hide_what_lies_behind():
    background = np.full((40, 60, 3), 100, np.uint8)
    before = np.zeros((40, 60), bool)
    before[0:20, 0:20] = True
    alpha = np.zeros((20, 30), np.float32)
    alpha[5:, :] = 1.0
    alpha[4, :] = 0.5  # not above one half: not the object's
    alpha[3, :] = 0.51
    behind = Layer(alpha[..., None] * np.float32(RED), alpha, 10, 10, 0.0, 30.0)
    full = np.ones((10, 10), np.float32)
    front = Layer(full[..., None] * np.float32(GREEN), full, 35, 20, 0.0, 30.0)
    image, (old, first, second) = flatten(background, [before], [behind, front])

    expected = np.zeros((40, 60), bool)
    expected[15:30, 10:40] = expected[13, 10:40] = True
    expected[20:30, 35:45] = False
    assert np.array_equal(first, expected)
    assert second.sum() == 100 and second[20:30, 35:45].all()
    assert np.array_equal(old, before & ~expected)
    assert (image[second] == GREEN).all() and (image[20, 12] == RED).all()
    assert (image[14, 20] == np.rint((np.array(RED) + 100) / 2)).all()
    assert (image[35:] == 100).all() and (background == 100).all() and before.sum() == 400


def test_shadows_darken_and_belong_to_nobody():
    background = np.full((60, 60, 3), 200, np.uint8)
    alpha = np.ones((20, 20), np.float32)
    layer = Layer(alpha[..., None] * np.float32(RED), alpha, 20, 20, 0.5, 40.0)
    image, (mask,) = flatten(background, [], [layer])
    assert mask.sum() == 400 and (image[mask] == RED).all()
    assert (image[~mask] <= 200).all() and image[41, 30].max() < 200 and image[5, 5].min() == 200


def test_an_object_cut_in_its_photo_is_cut_by_the_frame():
    background = np.full((80, 100, 3), 90, np.uint8)
    opaque = np.full((50, 30, 4), 255, np.uint8)
    for seed in range(20):
        cut = Cutout(opaque, "person", (False, False, False, True))
        layer = make_layer(np.random.default_rng(seed), background, cut, 40.0, np.array([50, 20]))
        assert layer is not None and layer.alpha[-1].max() > 0.9
        assert layer.y + layer.alpha.shape[0] == 80
        side = Cutout(opaque, "person", (True, False, False, False))
        layer = make_layer(np.random.default_rng(seed), background, side, 40.0, np.array([50, 40]))
        assert layer is not None and (layer.x == 0 or layer.x + layer.alpha.shape[1] == 100)


def _disc() -> Cutout:
    cv2.circle(alpha := np.zeros((64, 64), np.uint8), (32, 32), 30, 255, -1)
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Cutout(premultiplied(np.dstack([colours, alpha])), "animals")


def test_what_lies_outside_the_frame_is_not_pasted():
    background = np.full((80, 100, 3), 90, np.uint8)
    rng = np.random.default_rng(0)
    assert make_layer(rng, background, _disc(), 40.0, np.array([-60.0, 40])) is None
    layer = make_layer(rng, background, _disc(), 140.0, np.array([50.0, 40]))
    assert layer is not None and layer.alpha.shape == (80, 100)
    # 300 px of object, of which the frame would show an eighth
    assert make_layer(rng, background, _disc(), 300.0, np.array([50.0, 40])) is None
