"""The published data sets in small: folders of the exact form of each, and what is in them."""

import json
import pickle

import cv2
import numpy as np

HEIGHT, WIDTH = 12, 16
RED = (200, 10, 30)  # RGB


def box(x, y, w, h):
    """A rectangle as COCO polygons; it covers the pixels x…x+w-1, y…y+h-1."""
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def box_mask(x, y, w, h):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + h, x : x + w] = True
    return mask


LEFT, MIDDLE, RIGHT = (0, 0, 4, 4), (5, 2, 4, 6), (10, 3, 6, 9)
# MIDDLE as uncompressed run lengths, down the columns.
MIDDLE_RUNS = {"size": [HEIGHT, WIDTH], "counts": [62, 6, 6, 6, 6, 6, 6, 6, 88]}


def write_image(path, colour=RED, size=(HEIGHT, WIDTH)):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*size, 3), colour[::-1], np.uint8))


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_pickle(path, content, protocol=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))


def even_looks(image):
    """Stands for a network: people look everywhere alike, so shares are visible areas."""
    return np.full((3, 4), 1 / 12, np.float32)


def three_objects():
    return [
        {"bbox": [x, y, x + w, y + h], "segmentation": box(x, y, w, h)}
        for x, y, w, h in (LEFT, MIDDLE, RIGHT)
    ]


def write_assr(root):
    for split, names in (("train", ("101", "102")), ("val", ("201",)), ("test", ("301",))):
        write_json(
            root / f"obj_seg_data_{split}.json",
            [{"img": name, "object_data": three_objects()} for name in names],
        )
        for name in names:
            write_image(root / "images" / split / f"{name}.jpg")
            write_json(
                root / "rank_order" / split / f"{name}.json", {"rank_order": [0.9, 0.5, 1.0]}
            )
    return root


def write_irsr(root):
    for split, numbers in (("train", range(40, 50)), ("test", range(60, 62))):
        entries = []
        for number in numbers:
            name = f"{number:012d}.jpg"
            write_image(root / "Images" / split / "rgb" / name)
            entries.append(
                {
                    "file_name": f"/home/someone/IRSR/Images/{split}/rgb/{name}",
                    "rank": [2, 0, 1],
                    "annotations": [
                        {"bbox": list(LEFT), "bbox_mode": "xywh", "segmentation": box(*LEFT)},
                        {"bbox": list(MIDDLE), "bbox_mode": "xywh", "segmentation": MIDDLE_RUNS},
                        {"bbox": list(RIGHT), "bbox_mode": "xywh", "segmentation": box(*RIGHT)},
                    ],
                }
            )
        write_pickle(root / "Annotations" / f"{split}.pkl", entries)
    return root


def write_sifr(root):
    for split, numbers in (("train", range(40, 50)), ("test", range(60, 62))):
        entries = []
        for number in numbers:
            name = f"{number:012d}.jpg"
            write_image(root / split / "rgb" / name)
            entries.append(
                {
                    "file_name": name,
                    "image_id": number,
                    "height": HEIGHT,
                    "width": WIDTH,
                    "annotations": [
                        {"bbox": list(LEFT), "segmentation": box(*LEFT), "gt_rank": 1},
                        {"bbox": list(RIGHT), "segmentation": box(*RIGHT), "gt_rank": 0},
                    ],
                }
            )
        write_json(root / split / f"{split}_annotations.json", entries)
    return root


def coco_json(numbers):
    return {
        "images": [
            {"id": n, "file_name": f"{n:012d}.jpg", "height": HEIGHT, "width": WIDTH}
            for n in numbers
        ],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {
                "id": n,
                "image_id": n,
                "category_id": 1,
                "segmentation": box(*LEFT),
                "visiting_order": 1,
            }
            for n in numbers
        ],
    }


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_pickle(path, change):
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))
