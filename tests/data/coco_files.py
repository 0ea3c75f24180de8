"""Files in COCO's form for tests of own data."""

import copy
import json

from tests.data.scenes import paint_scene, write_image

# Not sorted and not contiguous, as own files often are.
CATEGORIES = [{"id": 7, "name": "pear"}, {"id": 2, "name": "apple"}, {"id": 9, "name": "fig"}]


def write_coco(folder, count=3, categories=CATEGORIES):
    """A COCO-format file with ``count`` images; returns (json, images folder, content)."""
    folder.mkdir()
    categories = copy.deepcopy(categories)
    images, annotations = [], []
    for i in range(count):
        scene = paint_scene(60, 80, seed=i)
        write_image(folder / f"{i}.png", scene.image)
        images.append({"id": 100 + i, "file_name": f"{i}.png", "height": 60, "width": 80})
        for k in range(3):
            x0, y0, x1, y1 = scene.polygon_annotations[k]["bbox"]
            annotations.append(
                {
                    "id": 10 * i + k,
                    "image_id": 100 + i,
                    "category_id": categories[k % len(categories)]["id"],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(scene.masks[k].sum()),
                    "iscrowd": 0,
                    "segmentation": scene.polygon_annotations[k]["segmentation"],
                }
            )
    content = {"images": images, "annotations": annotations, "categories": categories}
    save(folder, content)
    return str(folder / "data.json"), str(folder), content


def save(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "data.json").write_text(text)
