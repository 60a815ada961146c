# FUSU, real pairs only: the baseline, and the segmentor that filter.sh asks. A complete mmengine config.
#   CONFIG=demo/mmseg/fusu_base.py WORK_DIR=logs/fusu_base sh scripts/train_segmentor.sh
# The data lie as scripts/prepare_dataset.py leaves them. For other data change `class_table`, the manifests and
# `num_classes` here; nothing is copied into mmseg. Images of 512x512; 80k steps as the method's authors train.
_base_ = "../../configs/mmseg/pspnet_r50.py"
class_table = "fusu"
num_classes = 17  # (their config says 18, for 17 class names)
data_root = "data/fusu"
max_steps = 80_000

table_dataset = "post_processing.segmentation.dataset.TableSegDataset"
real = dict(
    type=table_dataset, class_table=class_table, manifest=f"{data_root}/train_set_items.json", data_root=data_root,
    pipeline=_base_.train_pipeline,  # noqa: F821
)  # fmt: skip
model = dict(decode_head=dict(num_classes=num_classes), auxiliary_head=dict(num_classes=num_classes))
train_dataloader = dict(
    batch_size=16, num_workers=4, persistent_workers=True, sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=real,
)  # fmt: skip
val_dataloader = dict(
    batch_size=1, num_workers=4, persistent_workers=True, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=table_dataset, class_table=class_table, manifest=f"{data_root}/val_set_items.json", data_root=data_root,
        pipeline=_base_.test_pipeline,  # noqa: F821
    ),
)  # fmt: skip
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_steps, val_interval=2000)
val_cfg = dict(type="ValLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=_base_.optimizer)  # noqa: F821
param_scheduler = [dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=0, end=max_steps, by_epoch=False)]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2000, max_keep_ckpts=1),
)
