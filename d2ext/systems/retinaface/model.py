"""RetinaFace: faces, their boxes, points and meshes (arXiv 1905.00641; CVPR 2020, pp. 5203-5212).

An image goes through :meth:`RetinaFace.preprocess` (its own size, or resized), the backbone and pyramid
(``fpn.py``), context modules and heads (``head.py``), and then either the losses (``targets.py``,
``losses.py``) or, in inference, decoding and NMS (``postprocess.py``) and the meshes of what is left
(``mesh.py``).

Letters: B images, H×W pixels of the network's input, A priors, P points, V mesh vertices.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from d2ext.codecs.boxes import clip_boxes
from d2ext.codecs.face_alignment import face_poses
from d2ext.codecs.prior_boxes import prior_boxes
from d2ext.config import ConfigError
from d2ext.data.faces import topology_of
from d2ext.layers.transfer import upload
from d2ext.modeling.export_form import ExportForm, Outputs
from d2ext.modeling.meta_arch import image_size, output_size
from d2ext.modeling.short_side import ShortSideMetaArch, scaled
from d2ext.systems.retinaface.head import RetinaFaceHead, RetinaFacePredictions
from d2ext.systems.retinaface.losses import RetinaFaceCriterion
from d2ext.systems.retinaface.mesh import MeshHead, decode_meshes, mesh_topology
from d2ext.systems.retinaface.postprocess import Candidates, decode, gather, select
from d2ext.systems.retinaface.targets import RetinaFaceTargets, read_targets

logger = logging.getLogger(__name__)

# Input sizes whose priors are kept: those of WIDER FACE's images vary without end.
_KEPT_PRIORS = 32
# NMS looks at so many candidates for each detection that is wanted, at more where that is too few, and
# then at all.
_LOOKED_AT = (2, 4)


class RetinaFaceNetwork(nn.Module):
    """Backbone, pyramid and heads: images (B, 3, H, W) → :class:`RetinaFacePredictions`."""

    def __init__(
        self, backbone: Backbone, head: RetinaFaceHead, in_features: Sequence[str]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.in_features = list(in_features)

    def forward(self, images: Tensor) -> RetinaFacePredictions:
        features = self.backbone(images)
        size = (images.shape[2], images.shape[3])
        return self.head([features[name] for name in self.in_features], size)


@META_ARCH_REGISTRY.register()
class RetinaFace(ShortSideMetaArch):
    """RetinaFace for boxes and, if it has these heads, for points and meshes of faces."""

    export_refusal = ""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: RetinaFaceHead,
        criterion: RetinaFaceCriterion,
        anchor_scales: Sequence[Sequence[float]],
        min_size: int = 0,
        max_size: int = 2150,
        score_threshold: float = 0.02,
        nms_threshold: float = 0.4,
        pre_nms_top_k: int = 5000,
        max_detections: int = 750,
        clip_boxes: bool = False,
        **meta_arch: Any,
    ) -> None:
        """Args:
        backbone: feature pyramid; all its levels are used, finest first.
        head: context modules and heads on it.
        criterion: the losses.
        anchor_scales: sides in pixels of each level's square priors, as many on each.
        min_size, max_size: of the image in inference, see :func:`short_side_scale`.
        pre_nms_top_k: see :func:`decode`.
        score_threshold, nms_threshold, max_detections: see :func:`select`.
        clip_boxes: clip boxes to the image.
        meta_arch: see :class:`MetaArch`.
        """
        super().__init__(**meta_arch)
        if min_size < 0 or (min_size > 0 and max_size < min_size):
            raise ValueError(
                "MODEL.RETINAFACE.TEST.MIN_SIZE and MAX_SIZE are pixels (MIN_SIZE 0: the image as it "
                f"is), not {min_size} and {max_size}."
            )
        self.backbone = backbone
        self.head = head
        self.criterion = criterion
        self.anchor_scales = [list(scales) for scales in anchor_scales]
        self.min_size = min_size
        self.max_size = max_size
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.pre_nms_top_k = pre_nms_top_k
        self.max_detections = max_detections
        self.clip_boxes = clip_boxes
        self._priors: dict[tuple[Any, ...], Tensor] = {}
        shapes = backbone.output_shape()
        features = sorted(shapes, key=lambda name: shapes[name].stride)
        self.set_network(RetinaFaceNetwork(backbone, head, features), self._decode)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        face = cfg.MODEL.RETINAFACE
        resized_before = cfg.INPUT.MIN_SIZE_TEST > 0
        if resized_before and face.TEST.MIN_SIZE > 0:
            logger.warning(
                f"INPUT.MIN_SIZE_TEST is {cfg.INPUT.MIN_SIZE_TEST}: test images are resized before the "
                "model sees them, as bytes, and the model does not resize them again. For published "
                "numbers set it to 0."
            )
        backbone = build_backbone(cfg)
        shapes = sorted(backbone.output_shape().values(), key=lambda shape: shape.stride)
        scales = face.ANCHORS.SCALES
        if len(scales) != len(shapes) or len({len(level) for level in scales}) != 1:
            raise ValueError(
                f"The pyramid has {len(shapes)} levels: MODEL.RETINAFACE.ANCHORS.SCALES needs as many "
                f"lists, all of the same length, not {scales}."
            )
        mesh, topology = None, None
        if face.MESH.NUM_VERTICES > 0:
            if cfg.INPUT.AUGMENTATION.SQUARE_CROP.PUBLISHED_CLIPPED_POINTS:
                raise ConfigError(
                    "INPUT.AUGMENTATION.SQUARE_CROP.PUBLISHED_CLIPPED_POINTS would crush the meshes of "
                    "faces at the crop's border: set it to False."
                )
            file = face.MESH.FILE or topology_of(cfg.DATASETS.TRAIN).get("mesh_file")
            topology = mesh_topology(file) if file else None
            mesh = MeshHead(face.FPN_CHANNELS, face.MESH.NUM_VERTICES, len(scales[0]), topology)
        head = RetinaFaceHead(
            shapes,
            num_classes=face.NUM_CLASSES,
            num_points=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0,
            priors_per_cell=len(scales[0]),
            norm=face.NORM,
            deformable=face.DEFORMABLE,
            shared=face.SHARED_HEADS,
            mesh=mesh,
        )
        criterion = RetinaFaceCriterion(
            max_meshes=face.MESH.MAX_MESHES,
            edges=None if topology is None else topology.edges,
            **{key.lower(): value for key, value in face.LOSS.items()},
        )
        return {
            **super().from_config(cfg),
            "backbone": backbone,
            "head": head,
            "criterion": criterion,
            "anchor_scales": scales,
            "min_size": 0 if resized_before else face.TEST.MIN_SIZE,
            "max_size": face.TEST.MAX_SIZE,
            "score_threshold": face.TEST.SCORE_THRESH,
            "nms_threshold": face.TEST.NMS_THRESH,
            "pre_nms_top_k": face.TEST.PRE_NMS_TOP_K,
            "max_detections": face.TEST.MAX_DETECTIONS,
            "clip_boxes": face.TEST.CLIP_BOXES,
        }

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Images of the inputs → (B, 3, H, W): in inference resized, then normalised, as published.

        In training, where the published images are all squares of one size, smaller ones are padded with
        zeros (the mean colour) at the bottom and right.
        """
        images = [self._resize(self.upload(x)) for x in batched_inputs]
        if len({image.shape for image in images}) == 1:
            return self.normalize(torch.stack(images).float())
        return ImageList.from_tensors([self.normalize(image) for image in images]).tensor

    def _resize(self, image: Tensor) -> Tensor:
        scale = self.network_scale((image.shape[1], image.shape[2]))
        return image if scale == 1 else scaled(image, scale)

    def priors(
        self, feature_sizes: Sequence[tuple[int, int]], input_size: tuple[int, int]
    ) -> Tensor:
        """(A, 4) prior boxes, centre form, on the model's device."""
        if not all(isinstance(side, int) for side in input_size):  # symbols, while exporting
            return self._make_priors(feature_sizes, input_size)
        key = (tuple(feature_sizes), tuple(input_size), self.device)
        if key not in self._priors:
            # A CUDA graph or compiled code keeps using the priors of its input size.
            if self.inference_network.mode == "eager" and len(self._priors) >= _KEPT_PRIORS:
                self._priors.clear()
            self._priors[key] = self._make_priors(feature_sizes, input_size)
        return self._priors[key]

    def _make_priors(
        self, feature_sizes: Sequence[tuple[int, int]], input_size: tuple[int, int]
    ) -> Tensor:
        return prior_boxes(
            feature_sizes,
            self.anchor_scales,
            [1.0],
            input_size,
            square=True,
            strides=self.head.strides,
        ).to(self.device)

    # Training

    def encode_targets(
        self, batched_inputs: list[dict[str, Any]], images: Tensor
    ) -> list[RetinaFaceTargets]:
        """See :func:`read_targets`. Relative to the padded batch: what is encoded are distances in sides
        of priors, the same for any size."""
        size = (images.shape[2], images.shape[3])
        vertices = 0 if self.head.mesh is None else self.head.mesh.num_vertices
        return [
            read_targets(inputs, size, self.head.num_points, self.device, vertices)
            for inputs in batched_inputs
        ]

    def losses(
        self, predictions: RetinaFacePredictions, targets: Sequence[RetinaFaceTargets]
    ) -> dict[str, Tensor]:
        """See :class:`RetinaFaceCriterion`."""
        priors = self.priors(predictions.feature_sizes, predictions.input_size)
        return self.criterion(predictions, priors, targets, self.head.mesh)

    def draw_training(
        self,
        batched_inputs: list[dict[str, Any]],
        images: Tensor,
        targets: Sequence[RetinaFaceTargets],
        predictions: RetinaFacePredictions,
    ) -> tuple[str, Tensor]:
        """Annotations of the first image beside its best detections, 20 or as many as annotations."""
        inputs = batched_inputs[0] | {"height": None, "width": None}
        first = tree_map_only(Tensor, lambda x: x[:1], predictions)
        results = self.postprocess(self._decode(first), [inputs])
        best = results[0]["instances"][: max(20, len(inputs["instances"]))]
        return self.draw_pair(inputs, best)

    # Inference

    @torch.no_grad()
    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Results of images of any sizes; see :meth:`postprocess`.

        Those of one network size run as a batch. Padding the others would change their results: beyond
        the image's border the network must see zeros in every layer.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for i, inputs in enumerate(batched_inputs):
            groups.setdefault(self.network_size(image_size(inputs)), []).append(i)
        results: dict[int, dict[str, Any]] = {}
        for members in groups.values():
            group = [batched_inputs[i] for i in members]
            results.update(zip(members, super().inference(group), strict=True))
        return [results[i] for i in range(len(batched_inputs))]

    def _decode(self, predictions: RetinaFacePredictions) -> Candidates:
        """See :func:`decode`."""
        priors = self.priors(predictions.feature_sizes, predictions.input_size)
        return decode(predictions, priors, self.pre_nms_top_k)

    def export_form(self) -> ExportForm:
        mesh = self.head.mesh
        names = ["scores", "classes", "boxes", *([] if self.head.points is None else ["points"])]
        names += [] if mesh is None else ["index", "priors", "vectors"]

        def pack(candidates: Candidates) -> Outputs:
            outputs = {name: getattr(candidates, name) for name in names}
            outputs["count"] = (candidates.scores > self.score_threshold).sum(dim=1)
            if mesh is not None:
                # Meshes of detections alone, see mesh.py: its layer runs after NMS.
                batch = outputs["scores"].shape[:1]
                for name, x in mesh.output.named_parameters():
                    outputs[f"mesh_{name}"] = x.expand(*batch, *x.shape)
            return outputs

        def unpack(outputs: Outputs) -> Candidates:
            if mesh is not None:
                for name, x in mesh.output.named_parameters():
                    x.data = outputs[f"mesh_{name}"][0]
            fields: dict[str, Any] = dict.fromkeys(Candidates._fields)
            return Candidates(**fields | {name: outputs[name] for name in names})

        return ExportForm(
            pack=pack,
            unpack=unpack,
            size=(480, 640),
            multiple=1,
            results="retinaface",
            options={
                "nms_threshold": self.nms_threshold,
                "max_detections": self.max_detections,
                "clip": self.clip_boxes,
                **({} if mesh is None else {"priors_per_cell": mesh.priors_per_cell}),
            },
        )

    def postprocess(
        self, predictions: Candidates, batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Instances]]:
        """Candidates → for each image ``{"instances": Instances}``, best first, with ``pred_boxes``,
        ``scores``, ``pred_classes``, with points ``pred_keypoints`` (N, P, 3), of which the last number
        is 1, with meshes ``pred_face_meshes`` (N, V, 3) in pixels, and with their topology also
        ``pred_face_poses`` (N, 3), see :func:`face_poses`."""
        shrunk = [self.network_scale(image_size(x)) for x in batched_inputs]
        candidates = predictions
        if set(shrunk) != {1.0}:
            factors = upload(torch.tensor(shrunk), self.device)
            boxes = candidates.boxes / factors[:, None, None]
            points = candidates.points
            points = None if points is None else points / factors[:, None, None, None]
            candidates = candidates._replace(boxes=boxes, points=points)
        for first in [*(times * self.max_detections for times in _LOOKED_AT), None]:
            selection = select(
                candidates,
                score_threshold=self.score_threshold,
                nms_threshold=self.nms_threshold,
                max_detections=self.max_detections,
                first=first,
                one_class=self.head.num_classes == 1,
            )
            fields = self._fields(candidates, selection.slots, batched_inputs)
            numbers = torch.stack([selection.counts, selection.incomplete])
            counts, incomplete = numbers.tolist()  # the host waits for the device
            if not any(incomplete):
                break
        results = []
        for i, (count, inputs) in enumerate(zip(counts, batched_inputs, strict=True)):
            own = {name: x[i, :count] for name, x in fields.items()}
            instances = Instances(
                output_size(inputs), pred_boxes=Boxes(own.pop("pred_boxes")), **own
            )
            if self.head.mesh is not None:
                self._add_meshes(instances, candidates, i, selection.slots[i, :count], inputs)
            results.append({"instances": instances})
        return results

    def _fields(
        self, candidates: Candidates, slots: Tensor, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Candidates in pixels of the inputs' images → what instances hold of those in ``slots`` (B, D),
        at the outputs' sizes: (B, D, ...)."""
        boxes = gather(candidates.boxes, slots)
        fields = {
            "scores": candidates.scores.gather(1, slots),
            "pred_classes": candidates.classes.gather(1, slots),
        }
        scales = [_output_scale(inputs) for inputs in batched_inputs]
        factors = None
        if set(scales) != {(1.0, 1.0)}:
            factors = upload(torch.tensor(scales), self.device)[:, None, None]
            boxes = (boxes.unflatten(2, (2, 2)) * factors).flatten(2)
        if candidates.points is not None:
            points = gather(candidates.points.flatten(2), slots).unflatten(2, (-1, 2))
            points = points if factors is None else points * factors
            fields["pred_keypoints"] = F.pad(points, (0, 1), value=1.0)
        if self.clip_boxes:
            sizes = [output_size(inputs) for inputs in batched_inputs]
            if len(set(sizes)) == 1:
                boxes = clip_boxes(boxes, sizes[0])
            else:
                each = zip(boxes, sizes, strict=True)
                boxes = torch.stack([clip_boxes(own, size) for own, size in each])
        return {"pred_boxes": boxes, **fields}

    def _add_meshes(
        self,
        instances: Instances,
        candidates: Candidates,
        i: int,
        keep: Tensor,
        inputs: dict[str, Any],
    ) -> None:
        """Meshes and poses of the detections ``keep`` of image i, at the output's size."""
        head = self.head.mesh
        assert head is not None
        factors = [s / self.network_scale(image_size(inputs)) for s in _output_scale(inputs)]
        factors.append((factors[0] * factors[1]) ** 0.5)
        meshes = self._meshes(candidates, i, keep)
        instances.pred_face_meshes = torch.stack(
            [x * f for x, f in zip(meshes.unbind(-1), factors, strict=True)], dim=-1
        )
        if head.mean is not None:
            instances.pred_face_poses = face_poses(instances.pred_face_meshes, head.mean)

    def _meshes(self, candidates: Candidates, i: int, keep: Tensor) -> Tensor:
        """(N, V, 3) of detections of image i, in pixels of the network's input."""
        head = self.head.mesh
        assert head is not None and candidates.vectors is not None
        index = candidates.index[i, keep]
        vectors = candidates.vectors[i, index // head.priors_per_cell].float()
        offsets = head(vectors, index % head.priors_per_cell)
        return decode_meshes(offsets.float(), candidates.priors[i, keep])


def _output_scale(inputs: dict[str, Any]) -> tuple[float, float]:
    """(x, y) pixels of the output per pixel of the input's image."""
    size, (height, width) = output_size(inputs), image_size(inputs)
    return size[1] / width, size[0] / height
