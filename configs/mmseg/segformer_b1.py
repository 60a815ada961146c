# SegFormer-B1: B0 with twice the width.
_base_ = "segformer_b0.py"
model = dict(backbone=dict(embed_dims=64), decode_head=dict(in_channels=[64, 128, 320, 512]))
