# What the segmentors of this folder have in common (MMSegmentation config, mmengine format).
#
# num_classes, class weights, data and work_dir are filled in by scripts/train_segmentor.py from the class table.
default_scope = "mmseg"
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    pretrained=None,
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
test_pipeline = [dict(type="PackSegInputs")]
