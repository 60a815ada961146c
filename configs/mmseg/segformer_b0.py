# SegFormer-B0 (MMSegmentation config, mmengine format) for 512x512 tiles on a GPU; b1 and b2 change the sizes only.
#
# Schedule of the SegFormer paper (AdamW, 6e-5, tenfold in the head, no decay of norms and positions), but 80k steps.
# Weights: --init_backbone FILE takes ImageNet's MiT weights in mmseg's names; without them it starts from random.
_base_ = "base.py"
crop_size = (512, 512)
init_backbone = "none"  # read by scripts/train_segmentor.py: "none" or a path
class_balance = 0.0  # loss weight of a class ~ (pixel share) ** -class_balance; 0 = all equal

norm_cfg = _base_.norm_cfg  # noqa: F821
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        type="MixVisionTransformer",
        in_channels=3,
        embed_dims=32,
        num_stages=4,
        num_layers=[2, 2, 2, 2],
        num_heads=[1, 2, 5, 8],
        patch_sizes=[7, 3, 3, 3],
        sr_ratios=[8, 4, 2, 1],
        out_indices=(0, 1, 2, 3),
        mlp_ratio=4,
        qkv_bias=True,
        drop_path_rate=0.1,
    ),
    decode_head=dict(
        type="SegformerHead",
        in_channels=[32, 64, 160, 256],
        in_index=[0, 1, 2, 3],
        channels=256,
        dropout_ratio=0.1,
        num_classes=2,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0, avg_non_ignore=True),
    ),
)

train_pipeline = [
    dict(type="post_processing.segmentation.dataset.RandomScale", ratio_range=(0.5, 2.0)),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]

max_steps = 80_000
batch_size = 16
learning_rate = 6e-5
warm_up = 0.02  # share of the steps
clip_grad = None
optimizer = dict(type="AdamW", lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.01)
paramwise_cfg = dict(
    custom_keys={"pos_block": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0), "head": dict(lr_mult=10.0)}
)
