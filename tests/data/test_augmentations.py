"""Every augmentation moves images, boxes, polygons, RLE masks and keypoints together."""

import copy

import cv2
import numpy as np
import pytest
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import polygons_to_bitmask
from fvcore.transforms.transform import NoOpTransform, TransformList

from d2ext.config import get_cfg
from d2ext.data import AUGMENTATION_REGISTRY, build_augmentations
from d2ext.data.augmentations import DetectionInput
from d2ext.data.augmentations.affine import RandomAffineWarp
from d2ext.data.augmentations.crop import (
    CenterCropRuleTransform,
    RandomCrop,
    RandomIoUCrop,
    WindowCropTransform,
)
from d2ext.data.augmentations.expand import ExpandTransform, RandomExpand
from d2ext.data.augmentations.photometric import PhotometricTransform, RandomPhotometricDistortion
from d2ext.data.augmentations.resize import (
    BilinearResizeTransform,
    RandomScale,
    ResizeShortestEdge,
    ResizeToSquare,
    ScaleShortestEdge,
    ScaleTransform,
)
from tests.data.scenes import COLORS, Scene, iou, object_at, paint_scene

FILL = (120.0, 130.0, 140.0)
AUGMENTATIONS = {
    "expand": RandomExpand(fill=FILL, prob=1.0, ratio=(1.2, 2.5)),
    "iou_crop": RandomIoUCrop(),
    "iou_crop_repaired": RandomIoUCrop(enforce_iou=True, min_ious=(0.1, 0.2)),
    "crop": RandomCrop("relative_range", (0.5, 0.5)),
    "flip": T.RandomFlip(),
    "square": ResizeToSquare(150),
    "scale": RandomScale((1.0, 1.5)),  # smaller factors are too coarse for masks, which are nearest
    "affine_crop": RandomAffineWarp((150, 170), scales=(0.8, 1.3)),
    "affine_shift": RandomAffineWarp((150, 170), "shift"),
    "shortest_edge": ResizeShortestEdge(100, 200, "choice"),
    "everything": [
        RandomExpand(fill=FILL),
        RandomIoUCrop(),
        T.RandomFlip(),
        ResizeToSquare(200),
    ],
}


def augment(augmentations, scene: Scene) -> tuple[DetectionInput, TransformList]:
    augmentations = augmentations if isinstance(augmentations, list) else [augmentations]
    boxes = np.array([a["bbox"] for a in scene.polygon_annotations])
    aug_input = DetectionInput(scene.image, boxes=boxes)
    return aug_input, T.AugmentationList(augmentations)(aug_input)


def transformed(annotation: dict, tfms: TransformList, shape: tuple[int, int]) -> dict:
    return detection_utils.transform_instance_annotations(
        copy.deepcopy(annotation), tfms, shape, keypoint_hflip_indices=[0]
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_annotations_follow_the_painted_objects(name, seed):
    scene = paint_scene(seed=seed)
    np.random.seed(seed)
    aug_input, tfms = augment(AUGMENTATIONS[name], scene)
    image, shape = aug_input.image, aug_input.image.shape[:2]
    seen = 0
    for i, color in enumerate(COLORS):
        painted = object_at(image, color)
        polygons = transformed(scene.polygon_annotations[i], tfms, shape)
        rle = transformed(scene.rle_annotations[i], tfms, shape)
        from_polygons = polygons_to_bitmask(polygons["segmentation"], *shape)
        if painted.sum() >= 100:
            seen += 1
            assert iou(painted, from_polygons) > 0.85
            assert iou(painted, rle["segmentation"].astype(bool)) > 0.9
            ys, xs = np.nonzero(painted)
            tight = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            # The box of a cut object need not be tight, but nothing may stick out of it.
            box = polygons["bbox"]
            assert (box[:2] <= tight[:2] + 2).all() and (box[2:] >= tight[2:] - 2).all()
            if name in ("flip", "square", "shortest_edge", "expand"):
                assert np.abs(box - tight).max() <= 2.5
            np.testing.assert_allclose(aug_input.boxes[i].clip(0, [*shape[::-1]] * 2), box)
        elif painted.sum() == 0:
            assert from_polygons.sum() <= 8 and rle["segmentation"].sum() <= 8
        x, y, visible = polygons["keypoints"][0]
        if visible:
            assert painted[min(int(y), shape[0] - 1), min(int(x), shape[1] - 1)]
        else:
            center = tfms.apply_coords(scene.points[i : i + 1].copy())[0]
            assert not ((center >= 0) & (center <= shape[::-1])).all()
    assert seen > 0


def test_coordinates_are_not_modified_in_place():
    points = np.array([[5, 7]])  # integers: in-place arithmetic would truncate
    for tfm in (
        ExpandTransform(160, 120, 30, 10, 300, 200, FILL),
        BilinearResizeTransform(120, 160, 77, 300),
    ):
        moved = tfm.apply_coords(points)
        assert points.tolist() == [[5, 7]]
    assert moved[0].tolist() == pytest.approx([5 * 300 / 160, 7 * 77 / 120])


class TestPhotometric:
    def test_hand_computed_values(self):
        pixel = np.array([[[200, 100, 50]]], np.uint8)  # RGB; hue 20 degrees, saturation 0.75
        bright = PhotometricTransform(brightness=70, image_format="RGB").apply_image(pixel)
        assert bright.dtype == np.float32
        np.testing.assert_allclose(bright[0, 0], [270, 170, 120])  # not clipped at 255
        contrast = PhotometricTransform(contrast=0.5, image_format="RGB").apply_image(pixel)
        np.testing.assert_allclose(contrast[0, 0], [100, 50, 25])
        grey = PhotometricTransform(saturation=0.0, image_format="RGB").apply_image(pixel)
        np.testing.assert_allclose(grey[0, 0], [200, 200, 200], atol=0.01)
        # 20 + 100 = 120 degrees is green; value 200, saturation 0.75 stay.
        green = PhotometricTransform(hue=100, image_format="RGB").apply_image(pixel)
        np.testing.assert_allclose(green[0, 0], [50, 200, 50], atol=0.1)
        wrapped = PhotometricTransform(hue=-20 - 360, image_format="RGB").apply_image(pixel)
        np.testing.assert_allclose(wrapped[0, 0], [200, 50, 50], atol=0.1)

    def test_order_matters(self):
        # HSV hue and saturation do not see a positive factor on all channels, so positive contrast
        # gives the same in both orders; a negative one shows which comes first.
        pixel = np.array([[[200, 100, 50]]], np.uint8)
        first = PhotometricTransform(contrast=-1, saturation=0.5, contrast_first=True)
        last = PhotometricTransform(contrast=-1, saturation=0.5, contrast_first=False)
        assert not np.allclose(first.apply_image(pixel), last.apply_image(pixel))

    def test_channel_order_is_respected(self):
        image = np.random.default_rng(0).integers(0, 255, (5, 6, 3)).astype(np.uint8)
        rgb = PhotometricTransform(saturation=1.3, hue=12, image_format="RGB").apply_image(image)
        bgr = PhotometricTransform(saturation=1.3, hue=12, image_format="BGR").apply_image(
            image[:, :, ::-1]
        )
        np.testing.assert_allclose(rgb, bgr[:, :, ::-1], atol=1e-3)

    def test_input_stays_and_masks_stay(self):
        image = paint_scene().image
        before = image.copy()
        tfm = PhotometricTransform(brightness=10, contrast=1.2, saturation=0.7, hue=5)
        tfm.apply_image(image)
        assert (image == before).all()
        mask = np.eye(4, dtype=np.uint8)
        assert tfm.apply_segmentation(mask) is mask

    def test_distribution(self):
        np.random.seed(0)
        augmentation = RandomPhotometricDistortion()
        image = np.zeros((1, 1, 3), np.uint8)
        drawn = [augmentation.get_transform(image) for _ in range(2000)]
        for name, neutral, low, high in (
            ("brightness", 0.0, -32, 32),
            ("contrast", 1.0, 0.5, 1.5),
            ("saturation", 1.0, 0.5, 1.5),
            ("hue", 0.0, -18, 18),
        ):
            values = np.array([getattr(t, name) for t in drawn])
            changed = values[values != neutral]
            assert 0.45 < len(changed) / len(values) < 0.55
            assert low <= changed.min() < low + 0.02 * (high - low)
            assert high - 0.02 * (high - low) < changed.max() <= high
        assert 0.45 < np.mean([t.contrast_first for t in drawn]) < 0.55

    def test_other_formats_are_refused(self):
        with pytest.raises(ValueError, match=r"INPUT\.FORMAT"):
            RandomPhotometricDistortion(image_format="L")
        with pytest.raises(ValueError, match="3 channels"):
            RandomPhotometricDistortion().get_transform(np.zeros((2, 2, 1), np.uint8))


class TestExpand:
    def test_fill_and_place(self):
        image = np.full((4, 6, 3), 7, np.uint8)
        for source in (image, image.astype(np.float32)):
            result = ExpandTransform(6, 4, 2, 1, 10, 8, FILL).apply_image(source)
            assert result.shape == (8, 10, 3) and result.dtype == source.dtype
            assert (result[1:5, 2:8] == 7).all()
            outside = np.ones((8, 10), bool)
            outside[1:5, 2:8] = False
            assert (result[outside] == FILL).all()

    def test_masks_get_zero_and_labels_the_ignore_label(self):
        tfm = ExpandTransform(2, 2, 1, 1, 4, 4, FILL)
        ones = np.ones((2, 2), np.uint8)
        assert tfm.apply_segmentation(ones).sum() == 4
        assert tfm.apply_labels(ones).sum() == 4 + 12 * 255
        aug_input = T.AugInput(np.zeros((20, 20, 3), np.uint8), sem_seg=np.ones((20, 20), np.uint8))
        np.random.seed(0)
        RandomExpand(prob=1.0, ratio=(2, 2))(aug_input)
        assert aug_input.sem_seg.shape == (40, 40)
        assert sorted(np.unique(aug_input.sem_seg)) == [1, 255]

    def test_sizes_and_frequency(self):
        np.random.seed(0)
        image = np.zeros((30, 50, 3), np.uint8)
        drawn = [RandomExpand().get_transform(image) for _ in range(1000)]
        expanded = [t for t in drawn if isinstance(t, ExpandTransform)]
        assert 0.45 < len(expanded) / 1000 < 0.55
        ratios = np.array([t.new_w / 50 for t in expanded])
        assert ratios.min() < 1.1 and 3.9 < ratios.max() <= 4
        corners = np.array([(t.left / t.new_w, t.top / t.new_h) for t in expanded])
        assert corners.min() >= 0 and corners.max() > 0.5

    def test_impossible_place_is_refused(self):
        with pytest.raises(ValueError, match="does not fit"):
            ExpandTransform(6, 4, 5, 1, 10, 8, FILL)
        with pytest.raises(ValueError, match="at least 1"):
            RandomExpand(ratio=(0.5, 2))


class TestRandomIoUCrop:
    BOX = np.array([[40.0, 30.0, 60.0, 50.0]])

    def crops(self, boxes, crowd=None, count=400, size=(100, 120), **kwargs):
        augmentation = RandomIoUCrop(**kwargs)
        crowd = np.zeros(len(boxes), bool) if crowd is None else crowd
        keep = np.ones(len(boxes), bool)
        np.random.seed(1)
        return [
            augmentation.get_transform(np.zeros((*size, 3)), boxes, crowd, keep)
            for _ in range(count)
        ]

    def test_windows_are_as_published(self):
        drawn = self.crops(self.BOX, count=1200)
        windows = [t for t in drawn if isinstance(t, CenterCropRuleTransform)]
        # One option in six is "no crop"; the others nearly always succeed for a central box.
        assert 0.13 < 1 - len(windows) / len(drawn) < 0.21
        for t in windows:
            assert t.x0 >= 0 and t.x0 + t.w <= 120 and t.y0 >= 0 and t.y0 + t.h <= 100
            assert t.w >= 0.3 * 120 - 1 and t.h >= 0.3 * 100 - 1
            assert 0.5 - 0.05 < t.h / t.w < 2 + 0.1
            assert t.x0 < 50 < t.x0 + t.w and t.y0 < 40 < t.y0 + t.h
        assert min(t.w for t in windows) < 45 and max(t.w for t in windows) > 110

    def test_overlap_never_rejects_unless_repaired(self):
        def best_ious(**kwargs):
            drawn = self.crops(self.BOX, **kwargs)
            windows = [t for t in drawn if isinstance(t, CenterCropRuleTransform)]
            return np.array([20 * 20 / (t.w * t.h) for t in windows])  # an upper bound of the IoU

        assert best_ious(min_ious=(0.2,) * 20).min() < 0.1
        repaired = best_ious(min_ious=(0.2,) * 200, enforce_iou=True)
        assert (repaired >= 0.2 - 1e-9).mean() > 0.95

    def test_only_centres_inside_stay(self):
        tfm = CenterCropRuleTransform(10, 10, 20, 20)
        boxes = np.array([[0, 0, 22, 22], [0, 0, 20, 20], [25, 25, 40, 40], [12, 12, 14, 14]])
        # Centres (11, 11) inside; (10, 10) on the border; (32.5, 32.5) outside; (13, 13) inside.
        assert tfm.keeps(boxes.astype(float)).tolist() == [True, False, False, True]

    def test_crowds_alone_do_not_hold_a_crop(self):
        assert all(
            isinstance(t, NoOpTransform) for t in self.crops(self.BOX, crowd=np.array([True]))
        )
        boxes = np.array([[40.0, 30, 60, 50], [100.0, 80, 110, 90]])
        for t in self.crops(boxes, crowd=np.array([True, False])):
            if not isinstance(t, NoOpTransform):
                assert t.keeps(boxes)[1]

    def test_image_without_boxes_is_cropped(self):
        drawn = self.crops(np.zeros((0, 4)))
        assert any(isinstance(t, CenterCropRuleTransform) for t in drawn)

    @pytest.mark.parametrize("size", [(1, 1), (1, 5000), (2, 1)])
    def test_extreme_shapes_end(self, size):
        boxes = np.array([[0.0, 0.0, size[1], size[0]]])
        for t in self.crops(boxes, size=size, count=5):
            if not isinstance(t, NoOpTransform):
                assert t.w >= 1 and t.h >= 1

    def test_dropped_instances_are_marked(self):
        scene = paint_scene()
        np.random.seed(3)
        aug_input, tfms = augment(RandomIoUCrop(scale=(0.3, 0.4)), scene)
        (tfm,) = tfms.transforms
        assert isinstance(tfm, CenterCropRuleTransform)
        boxes = np.array([a["bbox"] for a in scene.polygon_annotations])
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        low, high = np.array([tfm.x0, tfm.y0]), np.array([tfm.x0 + tfm.w, tfm.y0 + tfm.h])
        expected = ((centers > low) & (centers < high)).all(1)
        assert 0 < expected.sum() < 5
        assert aug_input.keep.tolist() == expected.tolist()


def test_expansion_does_not_bring_back_what_a_crop_cut():
    scene = paint_scene()
    tfms = TransformList(
        [
            WindowCropTransform(20, 20, 60, 60),
            ExpandTransform(60, 60, 30, 30, 120, 120, FILL),
        ]
    )
    image = tfms.apply_image(scene.image)
    for i, color in enumerate(COLORS):
        painted = object_at(image, color)
        polygons = transformed(scene.polygon_annotations[i], tfms, (120, 120))
        mask = polygons_to_bitmask(polygons["segmentation"], 120, 120)
        assert np.count_nonzero(mask != painted) <= 0.05 * 60 * 60
        assert mask[:30].sum() == mask[:, :30].sum() == mask[90:].sum() == mask[:, 90:].sum() == 0
        assert polygons["bbox"].min() >= 30 and polygons["bbox"].max() <= 90


class TestResize:
    def test_no_antialiasing_and_half_pixel_centres(self):
        image = np.zeros((1, 8, 1), np.float32)
        image[0, :, 0] = [0, 0, 8, 0, 0, 0, 0, 8]
        result = BilinearResizeTransform(1, 8, 1, 4).apply_image(image)
        assert result.shape == (1, 4, 1)
        # Output k lies at 2k + 0.5, halfway between two inputs; a smoothing resize looks wider.
        np.testing.assert_allclose(result[0, :, 0], [0, 4, 0, 4])

    def test_masks_stay_binary_and_labels_are_not_mixed(self):
        tfm = BilinearResizeTransform(2, 2, 8, 8)
        mask = np.array([[1, 0], [0, 0]], np.uint8)
        resized = tfm.apply_segmentation(mask)
        assert resized.dtype == np.uint8 and set(np.unique(resized)) == {0, 1}
        assert tfm.apply_segmentation(mask.astype(bool)).dtype == bool
        labels = np.array([[0, 10], [20, 255]], np.uint8)
        assert sorted(np.unique(tfm.apply_labels(labels))) == [0, 10, 20, 255]
        aug_input = T.AugInput(np.zeros((2, 2, 3), np.uint8), sem_seg=labels)
        ResizeToSquare(8)(aug_input)
        np.testing.assert_array_equal(aug_input.sem_seg, np.kron(labels, np.ones((4, 4))))

    def test_wrong_size_is_refused(self):
        with pytest.raises(ValueError, match="Expected an image of 4x4"):
            BilinearResizeTransform(4, 4, 8, 8).apply_image(np.zeros((4, 5, 3)))

    def test_long_thin_image_keeps_a_pixel(self):
        tfm = ResizeShortestEdge(800, 1333, "choice").get_transform(np.zeros((1, 5000, 3)))
        assert (tfm.new_h, tfm.new_w) == (1, 1333)
        image = np.zeros((1, 5000, 3), np.uint8)
        assert tfm.apply_image(image).shape == (1, 1333, 3)


class TestScale:
    @pytest.mark.parametrize("scale", [0.61, 1.0, 1.875])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_is_opencvs_resize_of_floats(self, scale, channels):
        image = np.random.default_rng(0).integers(0, 256, (40, 70, channels), dtype=np.uint8)
        tfm = ScaleTransform(40, 70, scale)
        expected = cv2.resize(image.astype(np.float32), None, fx=scale, fy=scale)
        actual = tfm.apply_image(image)
        assert actual.dtype == np.float32 and actual.shape == (*expected.shape[:2], channels)
        np.testing.assert_array_equal(actual.squeeze(), expected.squeeze())
        assert scale == 1 or (actual != actual.round()).any()
        np.testing.assert_allclose(
            tfm.apply_coords(np.array([[10.0, 4.0]])), [[10 * scale, 4 * scale]]
        )

    @pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, bool])
    def test_labels_and_masks_are_nearest(self, dtype):
        labels = (
            np.random.default_rng(0)
            .integers(0, 2 if dtype is bool else 200, (40, 70))
            .astype(dtype)
        )
        for scale in (0.61, 1.875):
            expected = cv2.resize(
                labels.astype(np.uint8), None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST
            )
            actual = ScaleTransform(40, 70, scale).apply_segmentation(labels)
            assert actual.dtype == dtype
            np.testing.assert_array_equal(actual, expected)

    def test_wrong_size_is_refused(self):
        with pytest.raises(ValueError, match="Expected an image of 4x4"):
            ScaleTransform(4, 4, 2.0).apply_image(np.zeros((4, 5, 3)))

    def test_long_thin_image_keeps_a_pixel(self):
        tfm = ScaleShortestEdge(800, 1333, "choice").get_transform(np.zeros((1, 5000, 3)))
        assert tfm.apply_image(np.zeros((1, 5000, 3), np.uint8)).shape == (1, 1333, 3)

    def test_short_sides_are_drawn(self):
        image = np.zeros((50, 100, 3), np.uint8)
        for lengths, style, seen in (
            ((20, 40), "choice", {20, 40}),
            ((20, 22), "range", {20, 21, 22}),
        ):
            augmentation = ScaleShortestEdge(lengths, 200, style)
            drawn = {
                augmentation.get_transform(image).apply_image(image).shape[0] for _ in range(60)
            }
            assert drawn == seen
        assert ScaleShortestEdge(40, 60).get_transform(image).apply_image(image).shape == (
            30,
            60,
            3,
        )

    def test_factors_are_uniform(self):
        image = np.zeros((50, 100, 3), np.uint8)
        augmentation = RandomScale((0.8, 1.5))
        drawn = np.array([augmentation.get_transform(image).scale for _ in range(400)])
        assert 0.8 <= drawn.min() < 0.82 and 1.48 < drawn.max() <= 1.5
        assert abs(drawn.mean() - 1.15) < 0.04
        with pytest.raises(ValueError, match="RESIZE_SCALE"):
            RandomScale((1.5, 0.8))


class TestRecipes:
    def cfg(self, name):
        cfg = get_cfg()
        cfg.INPUT.AUGMENTATION.NAME = name
        return cfg

    def test_ssd_is_the_published_sequence(self):
        augmentations = build_augmentations(self.cfg("ssd"), True)
        assert [type(a) for a in augmentations] == [
            RandomPhotometricDistortion,
            RandomExpand,
            RandomIoUCrop,
            ResizeToSquare,
            T.RandomFlip,
        ]
        assert augmentations[-2].size == 550

    @pytest.mark.parametrize("image_format", ["RGB", "BGR"])
    def test_fill_follows_the_format(self, image_format):
        cfg = self.cfg("ssd")
        cfg.INPUT.FORMAT = image_format
        photometric, expand = build_augmentations(cfg, True)[:2]
        assert photometric.image_format == image_format
        assert expand.fill[0] == (123.68 if image_format == "RGB" else 103.94)

    def test_default_is_detectron2s(self):
        cfg = self.cfg("default")
        cfg.INPUT.CROP.ENABLED = True
        crop, resize, flip = build_augmentations(cfg, True)
        assert isinstance(crop, RandomCrop) and isinstance(flip, T.RandomFlip)
        assert isinstance(resize, T.ResizeShortestEdge)
        assert resize.short_edge_length == cfg.INPUT.MIN_SIZE_TRAIN
        assert resize.max_size == cfg.INPUT.MAX_SIZE_TRAIN

    @pytest.mark.parametrize("name", ["ssd", "none", "default", "upsnet", "vpsnet"])
    def test_test_images_are_resized_like_detectron2s(self, name):
        (resize,) = build_augmentations(self.cfg(name), False)
        assert isinstance(resize, T.ResizeShortestEdge) and not resize.is_range
        assert resize.short_edge_length == (800, 800) and resize.max_size == 1333

    def test_upsnet_is_the_default_by_a_factor(self):
        cfg = self.cfg("upsnet")
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (640, 800), 1000
        resize, flip = build_augmentations(cfg, True)
        assert isinstance(resize, ScaleShortestEdge) and isinstance(flip, T.RandomFlip)
        assert resize.short_edge_length == (640, 800) and resize.max_size == 1000
        assert not resize.is_range
        cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING, cfg.INPUT.CROP.ENABLED = "range", True
        crop, resize, _ = build_augmentations(cfg, True)
        assert isinstance(crop, RandomCrop) and resize.is_range

    def test_vpsnet_is_the_published_sequence(self):
        cfg = self.cfg("vpsnet")
        cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE = True, "absolute"
        cfg.INPUT.CROP.SIZE = [800, 1600]
        augmentations = build_augmentations(cfg, True)
        assert [type(a) for a in augmentations] == [RandomScale, T.RandomFlip, RandomCrop]
        assert list(augmentations[0].scales) == [0.8, 1.5] and augmentations[1].prob == 0.5
        image = np.zeros((1024, 2048, 3), np.uint8)
        for _ in range(3):
            aug_input = DetectionInput(
                image, boxes=np.array([[0.0, 0, 10, 10], [2000, 0, 2048, 9]])
            )
            T.AugmentationList(augmentations)(aug_input)
            assert aug_input.image.shape == (800, 1600, 3)
            # At least one of the two corners lies outside of a window that is narrower.
            sides = aug_input.boxes[:, 2:] - aug_input.boxes[:, :2]
            assert (sides.prod(axis=1) == 0).any()
        cfg.INPUT.CROP.ENABLED, cfg.INPUT.RANDOM_FLIP = False, "none"
        assert len(build_augmentations(cfg, True)) == 1

    def test_none(self):
        assert build_augmentations(self.cfg("none"), True) == []

    def test_unknown_name_lists_the_known(self):
        with pytest.raises(ValueError, match="default, none"):
            build_augmentations(self.cfg("nonsense"), True)

    def test_own_recipe(self):
        name = "test_augmentations_own"

        @AUGMENTATION_REGISTRY.register_as(name)
        def recipe(cfg, is_train):
            return [T.RandomFlip(prob=1.0)]

        try:
            assert build_augmentations(self.cfg(name), True)[0].prob == 1.0
        finally:
            AUGMENTATION_REGISTRY._obj_map.pop(name)
