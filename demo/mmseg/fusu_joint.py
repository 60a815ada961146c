# FUSU, real and synthesized pairs: fusu_base.py with the set that resample.sh wrote, at the same number of steps.
#   CONFIG=demo/mmseg/fusu_joint.py WORK_DIR=logs/fusu_joint sh scripts/train_segmentor.sh
# The method's authors repeat the real set ten times beside the synthesized one and train three times as long. Here a
# sampler draws `ratio` synthesized images for each real one, however many files there are, and the length is equal.
_base_ = "fusu_base.py"
train_dataloader = dict(
    sampler=dict(_delete_=True, type="post_processing.segmentation.mixing.RatioSampler", ratio=1.0),
    dataset=dict(
        _delete_=True,
        type="post_processing.segmentation.mixing.JointSegDataset",
        datasets=[
            _base_.real,  # noqa: F821
            dict(
                type=_base_.table_dataset,  # noqa: F821
                class_table=_base_.class_table,  # noqa: F821
                manifest="outputs/fusu_resampled/train_set_items.json",
                data_root="outputs/fusu_resampled",
                pipeline=_base_.train_pipeline,  # noqa: F821
            ),
        ],
    ),
)
