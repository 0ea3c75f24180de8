"""pyramid_flow_shapes.yaml as a lazy config."""

from detectron2.config import LazyCall as L

from d2ext.modeling.flow import OpticalFlow, PyramidFlow

from ..common.training import training

dataloader, optimizer, lr_multiplier, train = training("flow/pyramid_flow_shapes.yaml")
model = L(OpticalFlow)(
    flow=L(PyramidFlow)(),
    input_format="RGB",
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
)
