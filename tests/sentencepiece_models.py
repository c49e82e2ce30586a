"""A release's tokenizer.model, made from the vocabulary and merges of a tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE, BPE = 1, 2, 3, 4, 6, 2


def write_tokenizer_model(source: Path, target: Path) -> Path:
    """Like the one that Mixtral was released with: byte-pair merges, byte fallback, text left as it is."""
    from sentencepiece import sentencepiece_model_pb2

    content = json.loads((source / "tokenizer.json").read_text())
    ids = {index: piece for piece, index in content["model"]["vocab"].items()}
    ids |= {token["id"]: token["content"] for token in content["added_tokens"]}
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in content["model"]["merges"]]
    rank = {"".join(merge): index for index, merge in enumerate(merges)}
    model = sentencepiece_model_pb2.ModelProto()
    kinds = {0: UNKNOWN, 1: CONTROL, 2: CONTROL, 3: USER_DEFINED, 4: USER_DEFINED}
    for index in range(len(ids)):
        piece = ids[index]
        is_byte = piece.startswith("<0x") and len(piece) == 6
        kind = kinds.get(index, BYTE if is_byte else NORMAL)
        model.pieces.add(piece=piece, type=kind, score=-float(rank.get(piece, 10**6)) if kind == NORMAL else 0.0)
    model.trainer_spec.model_type = BPE
    model.trainer_spec.vocab_size = len(ids)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    target.write_bytes(model.SerializeToString())
    return target
