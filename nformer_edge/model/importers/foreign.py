"""Models that this version does not build, by their tensors' names: an error names what a file holds."""

from __future__ import annotations

import re

from nformer_edge.model.importers.plan import State

_SIGNS = (
    ("CLIP-ReID", r"(image_encoder|text_encoder|prompt_learner)\."),
    ("SOLIDER", r"(.*\.)?semantic_embed_[wb]\."),
    ("TransReID", r"(.*\.)?(sie_embed|base\.(cls_token|pos_embed|patch_embed|blocks)\b)"),
    ("Person_reID_baseline_pytorch's PCB", r"classifier0\."),
    ("FastReID's MGN", r"b1_head\."),
    ("a Swin Transformer", r"(.*\.)?(layers|stages)\.\d+\.blocks\.\d+\.attn\."),
    ("a vision transformer", r"(.*\.)?(cls_token$|(blocks|resblocks)\.\d+\.attn\.)"),
    ("the network of Deep SORT (ckpt.t7)", r"conv\.0\.weight$"),
    ("a YOLO detector", r"(model\.)*\d+\.(conv|cv1)\."),
    ("FastReID with a backbone that is no ResNet", r"heads\.(bottleneck|bnneck|weight)"),
)


def name_of(state: State) -> str | None:
    """Whose model it is, with a tensor that says so, or None."""
    for model, sign in _SIGNS:
        found = next((name for name in state if re.match(sign, name)), None)
        if found is not None:
            return f"{model} (by {found})"
    return None
