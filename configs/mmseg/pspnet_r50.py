# PSPNet-R50 as the method's authors trained it: auxiliary FCN head, SGD 0.01 falling to 1e-4, 80k steps of 16 crops of
# 512x512, no warm-up, no clipping. (MMSegmentation config, mmengine format.)
#
# Theirs has SyncBN: on several GPUs scripts/train_segmentor.py converts. Their RandomResize at scale (1024, 256) first
# halves a 512x512 tile, so crops are 128 to 512 pixels wide and padded; kept, since their baseline has it.
_base_ = "base.py"
crop_size = (512, 512)
init_backbone = "none"  # read by scripts/train_segmentor.py: "none" or a path of ResNet-50 v1c weights in mmseg's names
class_balance = 0.0

norm_cfg = _base_.norm_cfg  # noqa: F821
loss = dict(type="CrossEntropyLoss", use_sigmoid=False, avg_non_ignore=True)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        type="ResNetV1c",
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        dilations=(1, 1, 2, 4),
        strides=(1, 2, 1, 1),
        norm_cfg=norm_cfg,
        norm_eval=False,
        style="pytorch",
        contract_dilation=True,
    ),
    decode_head=dict(
        type="PSPHead",
        in_channels=2048,
        in_index=3,
        channels=512,
        pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.1,
        num_classes=2,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(loss_weight=1.0, **loss),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=1024,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=2,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(loss_weight=0.4, **loss),
    ),
)

train_pipeline = [
    dict(type="RandomResize", scale=(1024, 256), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]

max_steps = 80_000
batch_size = 16
learning_rate = 0.01
warm_up = 0.0
eta_min = 1e-4
clip_grad = None
optimizer = dict(type="SGD", lr=learning_rate, momentum=0.9, weight_decay=0.0005)
