# SegFormer-B2: B1 with more layers and a wider head.
_base_ = "segformer_b1.py"
model = dict(backbone=dict(num_layers=[3, 4, 6, 3]), decode_head=dict(channels=768))
