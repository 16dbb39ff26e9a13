"""Data sets in small, in the exact form of each, what is in them, and material for scenes."""

import json
import pickle

import cv2
import numpy as np

HEIGHT, WIDTH = 12, 16
RED = (200, 10, 30)  # RGB, as the two below
PERSON, DOG = (220, 30, 30), (30, 200, 60)  # as `write_scene_folders` paints them


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


def write_cutout(path, seed):
    """A textured disc: photographic by the rules of `collect`."""
    rng = np.random.default_rng(seed)
    bgra = np.zeros((96, 96, 4), np.uint8)
    bgra[..., :3] = rng.integers(0, 256, 3) // 2 + rng.integers(0, 90, (96, 96, 1))
    cv2.circle(alpha := np.zeros((96, 96), np.uint8), (48, 48), 40, 255, -1)
    bgra[..., 3] = alpha
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), bgra)


def write_background(path, seed):
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    noise = rng.integers(-6, 7, (384, 512, 3))
    image = cv2.resize(small, (512, 384), interpolation=cv2.INTER_CUBIC) + noise
    cv2.imwrite(str(path), image.clip(0, 255).astype(np.uint8))


def write_scene_folders(root):
    """Twenty cut-outs, as many backgrounds, and ten photos of a person, half of them with a dog."""
    for i in range(20):
        write_cutout(root / "cutouts" / ("animals", "food")[i % 2] / f"cut{i}.png", i)
        write_background(root / "backgrounds" / f"back{i}.jpg", 100 + i)
    (root / "coco" / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(10):
        image = np.random.default_rng(i).integers(90, 110, (240, 320, 3), dtype=np.uint8)
        objects = [((100, 60, 90, 140), 1, PERSON), ((20, 30, 70, 80), 2, DOG)]
        for (x, y, w, h), category, colour in objects[: 1 + i % 2]:
            image[y : y + h, x : x + w] = colour
            one = {"image_id": i, "category_id": category, "iscrowd": 0}
            annotations.append(one | {"segmentation": box(x, y, w, h)})
        cv2.imwrite(str(root / "coco" / "images" / f"{i}.png"), image[..., ::-1])
        images.append({"id": i, "file_name": f"{i}.png", "width": 320, "height": 240})
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    write_json(root / "coco" / "instances.json", data)
    return {name: root / name for name in ("cutouts", "backgrounds", "coco")}


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_pickle(path, change):
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))
