# A segmentor of another family than small.py, that shares no ImageNet start with it: judge of images that a segmentor
# of that family guided or filtered (MMSegmentation config, mmengine format).
#
# ResNet-18 from nothing, because ImageNet weights for it cannot be had from PyPI, and because a common start would let
# both be pleased by the same texture. It needs two to three times the steps of small.py, each of which takes 1.5 times
# as long.
_base_ = "small.py"
init_backbone = "none"

norm_cfg = _base_.norm_cfg  # noqa: F821
model = dict(
    backbone=dict(
        _delete_=True,
        type="ResNetV1c",
        depth=18,
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        out_indices=(0, 1, 2, 3),
        norm_cfg=norm_cfg,
        norm_eval=False,
        style="pytorch",
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
)

learning_rate = 1e-3
optimizer = dict(type="AdamW", lr=learning_rate, weight_decay=0.01)
paramwise_cfg = None
