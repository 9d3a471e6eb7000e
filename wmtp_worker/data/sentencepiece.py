"""SentencePiece's `tokenizer.model` as a fast tokenizer that gives exactly the same ids.

transformers' own conversion ranks merges by id; Llama's runs of spaces have low ids and the lowest scores, so that
indented code came out in other tokens. Here merges are ranked by score, as SentencePiece does.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp_worker.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_MODEL = "tokenizer.model"

_BPE = 2  # model_type
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4  # type of a piece
_SPACE = "▁"
# Llama 3's tokenizer.model is another format under the same name
_INSTEAD = "take the tokenizer.json of the model's Hugging Face version"


def from_sentencepiece(path: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in a `tokenizer.model`. Raises `InputError` for anything but BPE that leaves the text as it is."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

    proto = _read(path)
    pieces, spec = proto.pieces, proto.trainer_spec
    vocabulary = {piece.piece: number for number, piece in enumerate(pieces)}
    merges = generate_merges(vocabulary, {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL})
    backend = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=spec.unk_piece,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    )
    prefix = proto.normalizer_spec.add_dummy_prefix
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(content=" ", left=1)] if prefix else []),
        ]
    )
    backend.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in pieces
            if piece.type in (_UNKNOWN, _CONTROL)
        ]
    )

    def named(number: int) -> str | None:
        return pieces[number].piece if 0 <= number < len(pieces) else None

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=spec.unk_piece,
        bos_token=named(spec.bos_id),
        eos_token=named(spec.eos_id),
        clean_up_tokenization_spaces=False,
    )


def _read(path: Path) -> Any:
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        well_formed = len(proto.pieces) > 0
    except Exception:  # protobuf's own DecodeError, of one implementation or another
        well_formed = False
    if not well_formed:
        raise InputError("not a SentencePiece model", where=str(path), fix=_INSTEAD)
    spec, normal = proto.trainer_spec, proto.normalizer_spec
    for what, wrong in {
        "is not BPE": spec.model_type != _BPE,
        "changes the text (normalisation rules)": bool(normal.precompiled_charsmap) or normal.remove_extra_whitespaces,
        "marks spaces at the end of words": spec.treat_whitespace_as_suffix,
        "has symbols that are never cut": any(piece.type == _USER for piece in proto.pieces),
    }.items():
        if wrong:
            raise InputError(
                f"a SentencePiece model that {what}",
                where=str(path),
                fix=_INSTEAD,
            )
    return proto
