"""DensePose R-CNN (arXiv 1802.00434) and continuous surface embeddings (arXiv 2011.12438)."""

from d2ext.systems.densepose import checkpoint, config, exported  # noqa: F401  (for registration)
from d2ext.systems.densepose.cse_losses import EmbeddingLoss, PixelCycle, ShapeCycle
from d2ext.systems.densepose.embedder import Embedder, VertexEmbedder, normalize_embeddings
from d2ext.systems.densepose.head import (
    DENSEPOSE_HEAD_REGISTRY,
    DensePoseDecoder,
    DensePoseDeepLabHead,
    DensePoseV1ConvXHead,
)
from d2ext.systems.densepose.losses import ChartLoss
from d2ext.systems.densepose.predictor import (
    DENSEPOSE_PREDICTOR_REGISTRY,
    DensePoseChartPredictor,
    DensePoseEmbeddingPredictor,
)
from d2ext.systems.densepose.roi_heads import DensePoseROIHeads
from d2ext.systems.densepose.targets import DensePoseTargets
from d2ext.systems.densepose.tta import GeneralizedRCNNWithTTA

__all__ = [
    "DENSEPOSE_HEAD_REGISTRY",
    "DENSEPOSE_PREDICTOR_REGISTRY",
    "ChartLoss",
    "DensePoseChartPredictor",
    "DensePoseDecoder",
    "DensePoseDeepLabHead",
    "DensePoseEmbeddingPredictor",
    "DensePoseROIHeads",
    "DensePoseTargets",
    "DensePoseV1ConvXHead",
    "Embedder",
    "EmbeddingLoss",
    "GeneralizedRCNNWithTTA",
    "PixelCycle",
    "ShapeCycle",
    "VertexEmbedder",
    "normalize_embeddings",
]
