"""The measures against the published values, the definition by hand, and a naive version."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
from naive_metrics import naive_metrics

from dsgnn.metrics import STRIP, evaluate, image_metrics, summarise

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"


def masks(*rows: str) -> np.ndarray:
    """One-row masks: masks("##..", "..##") -> (2, 1, 4) bool."""
    return np.array([[character == "#" for character in row] for row in rows])[:, None, :]


def none(width: int) -> np.ndarray:
    return np.zeros((0, 1, width), bool)


# --- the published code's values ---------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    stored = json.loads((GOLDEN / "metrics.json").read_text())
    arrays = dict(np.load(GOLDEN / "metrics.npz"))
    height, width = stored["height"], stored["width"]

    def unpack(packed):
        flat = np.unpackbits(packed, axis=1)[:, : height * width]
        return flat.reshape(-1, height, width).astype(bool)

    samples = [
        (
            unpack(arrays[f"{i}_gt"]),
            arrays[f"{i}_gt_ranks"],
            unpack(arrays[f"{i}_pred"]),
            arrays[f"{i}_scores"],
        )
        for i in range(stored["images"])
    ]
    return samples, stored["expected"]


@pytest.mark.parametrize("palette", ["assr", "irsr"])
def test_equals_the_published_evaluation(golden, palette):
    samples, expected = golden
    result = evaluate(iter(samples), protocol="dsgnn", palette=palette)
    for name, value in expected[palette]["total"].items():
        assert result[name] == pytest.approx(value, rel=0, abs=1e-6), name
    assert len(result["per_image"]) == len(expected[palette]["per_image"]) == 200
    for image, values in zip(result["per_image"], expected[palette]["per_image"], strict=True):
        for name, value in zip(("mae", "spearman", "sa_sor"), values, strict=True):
            if value is None:
                assert image[name] is None
            else:
                assert image[name] == pytest.approx(value, rel=0, abs=1e-6)
    left_out = np.array([[v is None for v in row] for row in expected[palette]["per_image"]])
    used = {name: result["used"][name] for name in ("mae", "sor", "sa_sor")}
    assert used == dict(zip(used, (200 - left_out.sum(0)).tolist(), strict=True))


def test_equals_the_authors_sa_sor(golden):
    samples, expected = golden
    result = evaluate(samples, protocol="official")
    assert result["sa_sor"] == pytest.approx(expected["official_sa_sor"]["total"], rel=0, abs=1e-6)
    for image, value in zip(
        result["per_image"], expected["official_sa_sor"]["per_image"], strict=True
    ):
        assert (image["sa_sor"] is None) == (value is None)
        if value is not None:
            assert image["sa_sor"] == pytest.approx(value, rel=0, abs=1e-6)
    assert result["mae"] == evaluate(samples)["mae"]  # `official` changes SA-SOR only
    assert result["sor"] == evaluate(samples)["sor"]


# --- the definition, by hand -------------------------------------------------------------------


def test_a_perfect_answer():
    truth = masks("##....", "..##..", "....##")
    image = image_metrics(truth, [2, 3, 1], truth, [0.5, 7.0, -1.0])
    assert image == {
        "mae": 0.0,
        "spearman": pytest.approx(1),
        "sa_sor": pytest.approx(1),
        "f_measure": pytest.approx(1),
        "objects": 3,
        "predictions": 3,
        "matched": 3,
        "matched_iou": 1.0,
        "false_objects": 0,
    }


def test_no_predictions():
    truth = masks("##......", "..####..")
    image = image_metrics(truth, [1, 2], none(8), [], palette="assr")
    # The map is compared with 0: 229/255 on 2 of 8 pixels (second of two), 1 on 4 of 8.
    assert image["mae"] == pytest.approx((2 * 229 / 255 + 4) / 8)
    assert image_metrics(truth, [1, 2], none(8), [], palette="irsr")["mae"] == pytest.approx(
        (2 * 1 / 2 + 4) / 8
    )
    assert image["sa_sor"] == 0.0  # both unmatched: rank 0 twice, constant
    assert image["spearman"] is None  # nothing is painted
    assert image["f_measure"] == 0.0
    assert (image["matched"], image["matched_iou"], image["false_objects"]) == (0, None, 0)


def test_the_assr_greys_end_at_the_fifth_object():
    truth = np.eye(7, dtype=bool)[:, None, :]
    mae = image_metrics(truth, np.arange(7, 0, -1), none(7), [], palette="assr")["mae"]
    assert mae == pytest.approx((255 + 229 + 204 + 178 + 153 + 153 + 153) / 255 / 7)


def test_no_ground_truth():
    image = image_metrics(none(8), [], masks("##......", "..##...."), [2.0, 1.0], palette="irsr")
    assert image["mae"] == pytest.approx((2 * 1 + 2 * 0.5) / 8)
    assert (image["spearman"], image["sa_sor"], image["f_measure"]) == (None, None, 0.0)
    assert (image["objects"], image["matched"], image["false_objects"]) == (0, 0, 2)


def test_nothing_on_either_side():
    image = image_metrics(none(8), [], none(8), [])
    assert image["mae"] == 0.0
    assert (image["spearman"], image["sa_sor"], image["f_measure"]) == (None, None, None)
    assert (image["objects"], image["predictions"], image["false_objects"]) == (0, 0, 0)


def test_tied_scores_share_the_lower_rank():
    truth = masks("##....", "..##..", "....##")
    image = image_metrics(truth, [1, 2, 3], truth, [5.0, 5.0, 9.0], palette="irsr")
    # Predicted ranks 1 1 3 against 1 2 3: 2 / sqrt(2 * 8/3).
    assert image["sa_sor"] == pytest.approx(2 / np.sqrt(16 / 3))
    assert image["spearman"] == pytest.approx(np.sqrt(3) / 2)  # mean ranks 1.5 1.5 3
    assert image["mae"] == pytest.approx(2 / 6 * (2 / 3 - 1 / 3))  # the middle object, rank 1 of 3


def test_all_scores_tied():
    truth = masks("##..", "..##")
    image = image_metrics(truth, [1, 2], truth, [4.0, 4.0])
    assert image["sa_sor"] == 0.0
    assert image["spearman"] is None


def test_one_object():
    truth = masks("####....")
    image = image_metrics(truth, [1], masks("####....", ".....##."), [1.0, 2.0])
    assert image["sa_sor"] is None  # there is no order to get right
    assert image["spearman"] == 1.0
    assert image["mae"] == pytest.approx((4 * (1 - 229 / 255) + 2) / 8)
    assert (image["matched"], image["false_objects"]) == (1, 1)
    # Found for SOR (three of four pixels painted), not for SA-SOR (IoU 3/7).
    image = image_metrics(truth, [1], masks(".#######"), [1.0])
    assert (image["spearman"], image["matched"]) == (1.0, 0)


def test_more_predictions_than_objects():
    truth = masks("##......", "..##....", "....##..")
    found = masks("......#.", ".......#", "..##....", "....##..")
    scores = [0.0, 0.5, 1.0, 2.0]
    # The first object is unmatched: rank 0. The list ranked is 1, 2 (matched), then 0, 0.5 (extra).
    # dsgnn cuts it to three, 1 2 0: ranks 2 3 -> 0 2 3. official keeps four: ranks 3 4 -> 0 3 4.
    dsgnn = image_metrics(truth, [1, 2, 3], found, scores, protocol="dsgnn")
    official = image_metrics(truth, [1, 2, 3], found, scores, protocol="official")
    assert dsgnn["sa_sor"] == pytest.approx(np.corrcoef([1, 2, 3], [0, 2, 3])[0, 1])
    assert official["sa_sor"] == pytest.approx(np.corrcoef([1, 2, 3], [0, 3, 4])[0, 1])
    assert dsgnn["matched"] == 2 and dsgnn["false_objects"] == 2
    # As many as objects: the extra ones are not ranked, in either protocol -> 0 1 2.
    for protocol in ("dsgnn", "official"):
        image = image_metrics(truth, [1, 2, 3], found[1:], scores[1:], protocol=protocol)
        assert image["sa_sor"] == pytest.approx(1)


def test_the_loser_of_a_prediction_gets_no_second_choice():
    truth = masks("##########", "########..")
    found = masks("#########.", "######....")
    # Both want prediction 0 (IoU 0.9 and 8/9); the second would have had prediction 1 (6/8).
    image = image_metrics(truth, [2, 1], found, [1.0, 2.0])
    assert (image["matched"], image["matched_iou"]) == (1, pytest.approx(0.9))
    assert image["sa_sor"] == pytest.approx(1)  # ranks 1 and 0
    assert image_metrics(truth, [1, 2], found, [1.0, 2.0])["sa_sor"] == pytest.approx(-1)


def test_the_iou_threshold_is_inclusive_and_the_painted_share_is_not():
    image = image_metrics(masks("####...."), [1], masks("##......"), [1.0])
    assert (image["matched"], image["spearman"]) == (1, None)  # IoU 1/2; half is painted
    image = image_metrics(masks("####...."), [1], masks("##......"), [1.0], iou_threshold=0.51)
    assert image["matched"] == 0


def test_later_predictions_are_painted_over_earlier_ones():
    truth = masks("##..", "..##")
    found = masks("##..", "..##", "##..")
    image = image_metrics(truth, [2, 1], found, [3.0, 2.0, 1.0])
    assert image["spearman"] == pytest.approx(-1)  # the first object shows rank 1, the second 2
    assert image["mae"] == pytest.approx(
        (2 * (1 - 204 / 255) + 2 * 0) / 4  # 1 of 3 on 2 of 2; 2 of 3 on 1 of 2
    )


def test_of_equally_common_ranks_the_most_salient_counts():
    found = masks("##....", "..##..", "....##")
    image = image_metrics(masks("####..", "....##"), [2, 1], found, [1.0, 9.0, 5.0])
    assert image["spearman"] == pytest.approx(1)  # ranks 3 (of 1 and 3, two pixels each) and 2


def test_predictions_of_one_rank_vote_together():
    found = masks("##.....", "..##...", "#######")[[2, 0, 1]]
    # 2 + 2 pixels of the tied rank 1 outvote 3 of rank 3 ("#######", painted first).
    truth = masks("#######")
    other = masks("......#")
    image = image_metrics(
        np.concatenate([truth, other]), [1, 2], found, [9.0, 1.0, 1.0], palette="irsr"
    )
    assert image["spearman"] == pytest.approx(1)  # 1 and 3


# --- against the naive version -----------------------------------------------------------------


def random_sample(rng, objects, predictions, height=24, width=31):
    def boxes(count):
        out = np.zeros((count, height, width), bool)
        for mask in out:
            y, x = rng.integers(0, height - 4), rng.integers(0, width - 4)
            mask[y : y + rng.integers(3, height), x : x + rng.integers(3, width)] = True
            mask ^= mask & (rng.random(mask.shape) < 0.05)
        return out

    truth = boxes(objects)
    near = [truth[rng.integers(objects)] if objects else None for _ in range(predictions)]
    found = (
        np.stack(
            [
                boxes(1)[0]
                if mask is None or rng.random() < 0.3
                else np.roll(mask, rng.integers(3), 1)
                for mask in near
            ]
        ).reshape(-1, height, width)
        if predictions
        else np.zeros((0, height, width), bool)
    )
    scores = rng.integers(0, 2 * predictions + 1, predictions).astype(np.float32)  # some tie
    return truth, rng.permutation(objects) + 1, found, scores


@pytest.mark.parametrize("protocol", ["dsgnn", "official"])
@pytest.mark.parametrize("palette", ["assr", "irsr"])
@pytest.mark.parametrize("threshold", [0.5, 0.75, 0.3])
def test_equals_the_naive_version(protocol, palette, threshold):
    rng = np.random.default_rng(3)
    counts = [(0, 0), (0, 3), (2, 0), (1, 1), (1, 4), (5, 5), (8, 8), (9, 8), (3, 30), (12, 20)]
    defined = dict.fromkeys(("spearman", "sa_sor"), 0)
    for objects, predictions in counts * 3:
        sample = random_sample(rng, objects, predictions)
        ours = image_metrics(*sample, protocol, palette, threshold)
        for name, value in naive_metrics(*sample, protocol, palette, threshold).items():
            assert ours[name] == (value if value is None else pytest.approx(value, abs=1e-9)), name
            if name in defined and value is not None:
                defined[name] += 1
    assert min(defined.values()) >= 12  # most samples say something


def test_photos_larger_than_a_strip():
    sample = random_sample(np.random.default_rng(5), 4, 6, height=2 * STRIP // 301, width=307)
    assert sample[0][0].size > 2 * STRIP
    expected = naive_metrics(*sample)
    ours = image_metrics(*sample)
    assert {name: ours[name] for name in expected} == pytest.approx(expected, abs=1e-9)


@pytest.mark.filterwarnings("error")
def test_empty_and_strided_masks():
    rng = np.random.default_rng(0)
    truth, ranks, found, scores = random_sample(rng, 4, 4)
    truth[1], found[2] = False, False  # neither matches the other: they share nothing
    expected = naive_metrics(truth, ranks, found, scores)
    ours = image_metrics(truth, ranks, found, scores)
    strided = image_metrics(
        np.asfortranarray(truth), ranks, np.repeat(found, 2, 2)[:, :, ::2], scores
    )
    assert strided == ours
    assert {name: ours[name] for name in expected} == pytest.approx(expected)


# --- totals ------------------------------------------------------------------------------------


def test_totals_say_how_much_they_rest_on():
    truth = masks("####....", "....####")
    samples = [
        (truth, [1, 2], truth, [1.0, 2.0]),  # right
        (truth, [1, 2], truth, [2.0, 1.0]),  # reversed
        (truth[:1], [1], masks("##......", "......##"), [1.0, 2.0]),  # IoU 1/2; half painted
        (none(8), [], masks("##......"), [1.0]),
        (none(8), [], none(8), []),
    ]
    result = evaluate(samples)
    assert result["images"] == 5
    assert result["used"] == {
        "mae": 5,
        "sor": 2,
        "sa_sor": 2,
        "recall": 5,
        "matched_iou": 5,
        "f_measure": 4,
        "false_objects": 5,
        "false_objects_on_empty": 2,
    }
    assert result["sor"] == pytest.approx((1 + 0) / 2)
    assert result["sa_sor"] == pytest.approx((1 - 1) / 2)
    assert result["recall"] == 1.0
    assert result["matched_iou"] == pytest.approx((4 * 1 + 0.5) / 5)
    # Third image: precision 2/4, recall 2/4 -> 0.5. Fourth: 0. Fifth: no map to measure.
    assert result["f_measure"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert result["false_objects"] == pytest.approx((1 + 1) / 5)
    assert result["false_objects_on_empty"] == pytest.approx(1 / 2)
    assert list(result["by_objects"]) == [0, 1, 2]
    assert [group["images"] for group in result["by_objects"].values()] == [2, 1, 2]
    assert result["by_objects"][2]["mae"] == pytest.approx((0 + (1 - 229 / 255)) / 2)
    assert result["by_objects"][0]["sa_sor"] is None
    json.dumps(result)  # plain values only


def test_images_measured_apart_give_the_same_totals():
    rng = np.random.default_rng(1)
    samples = [random_sample(rng, objects, 5) for objects in (0, 1, 2, 5, 6)]
    parts = [image_metrics(*sample, "official", "irsr") for sample in samples]
    assert summarise(parts, "official", "irsr") == evaluate(samples, "official", "irsr")


def test_no_images():
    result = evaluate([])
    assert result["images"] == 0 and result["mae"] is None and result["by_objects"] == {}


def test_samples_are_not_kept():
    alive: list[weakref.ref] = []
    most = 0

    def stream():
        nonlocal most
        for _ in range(6):
            truth = np.zeros((2, 4, 4), bool)
            truth[:, :2] = True
            alive.append(weakref.ref(truth))
            most = max(most, sum(reference() is not None for reference in alive))
            yield truth, [1, 2], truth, [1.0, 2.0]
            del truth

    evaluate(stream())
    assert most <= 2  # the one measured and the one being made


# --- wrong input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: np.zeros((2, 4, 4), np.uint8)}, r"sample 1: gt_masks must be \(N, h, w\) bool"),
        ({3: [1.0]}, r"pred_masks must be .* got \(2, 4, 4\) bool with \(1,\)"),
        ({3: [1.0, np.nan]}, "pred_scores must be finite"),
        ({2: np.zeros((2, 4, 5), bool)}, r"one size: gt_masks are \(4, 4\), pred_masks \(4, 5\)"),
        ({0: np.zeros((2, 0, 4), bool), 2: np.zeros((2, 0, 4), bool)}, "must have pixels"),
    ],
)
def test_a_sample_that_does_not_fit_is_named(change, message):
    good = [np.ones((2, 4, 4), bool), [1, 2], np.ones((2, 4, 4), bool), [1.0, 2.0]]
    bad = [change.get(position, value) for position, value in enumerate(good)]
    with pytest.raises(ValueError, match=message):
        evaluate([good, bad])


def test_a_short_sample_is_named():
    with pytest.raises(ValueError, match="sample 0: expected masks, ranks, .*, got 3"):
        evaluate([(np.ones((1, 2, 2), bool), [1], np.ones((1, 2, 2), bool))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "coco"}, "protocol must be one of dsgnn, official, got 'coco'"),
        ({"palette": "grey"}, "palette must be one of assr, irsr, got 'grey'"),
        ({"iou_threshold": 0}, r"iou_threshold must be in \(0, 1\], got 0"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate([], **options)
