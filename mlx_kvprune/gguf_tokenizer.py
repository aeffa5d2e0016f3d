"""The tokenizer inside a GGUF, as the files that Hugging Face tokenizers read.

Two families: byte-level BPE ("gpt2": vocabulary and merges are in the file) and SentencePiece ("llama": pieces with
scores; the merges follow from the scores, as in transformers' own converter).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_kvprune.gguf_reader import GGUF

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # ours -> GGUF's


def write_tokenizer(gguf: GGUF, folder: Path) -> dict[str, Any]:
    """Write tokenizer.json and tokenizer_config.json into ``folder``.

    Returns:
        The ids for config.json and generation_config.json: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.

    Raises:
        ValueError: the file has no tokenizer, or one of another family.
    """
    tokens = _field(gguf, "tokens")
    try:
        tokenizer = _build(gguf, tokens)
    except Exception as error:  # of lists that do not match; of tokenizers itself a bare one
        if str(error).startswith("[gguf]"):
            raise
        raise ValueError(
            f"[gguf] the tokenizer in {gguf.path.name} is damaged; got {error}; try to download it again"
        ) from error
    if tokenizer.get_vocab_size() != len(tokens):
        raise ValueError(
            f"[gguf] the tokenizer in {gguf.path.name} is damaged; got {tokenizer.get_vocab_size()} distinct tokens of "
            f"{len(tokens)}; try to download it again"
        )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(_settings(gguf, tokens), indent=1), encoding="utf-8")
    ids: dict[str, Any] = {f"{ours}_token_id": _id(gguf, theirs) for ours, theirs in SPECIAL.items() if ours != "unk"}
    end_of_turn = _id(gguf, "eot")
    if end_of_turn not in (None, ids["eos_token_id"]):
        ids["eos_token_id"] = [ids["eos_token_id"], end_of_turn]
    return {key: value for key, value in ids.items() if value is not None}


def _field(gguf: GGUF, key: str) -> Any:
    if (value := gguf.fields.get(f"tokenizer.ggml.{key}")) is None:
        raise ValueError(f"[gguf] {gguf.path.name} has no tokenizer; got no tokenizer.ggml.{key}; try another file")
    return value


def _id(gguf: GGUF, key: str) -> int | None:
    return gguf.fields.get(f"tokenizer.ggml.{key}_token_id")


def _adds_bos(gguf: GGUF) -> bool:
    default = _field(gguf, "model") == "llama" or gguf.fields.get("tokenizer.ggml.pre") == "llama-bpe"
    return bool(gguf.fields.get("tokenizer.ggml.add_bos_token", default))


def _settings(gguf: GGUF, tokens: list[str]) -> dict[str, Any]:
    named = {f"{ours}_token": _id(gguf, theirs) for ours, theirs in SPECIAL.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": gguf.get("context_length"),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(gguf),
        "chat_template": gguf.fields.get("tokenizer.chat_template"),
        **{key: None if id is None else tokens[id] for key, id in named.items()},
    }
    return {key: value for key, value in settings.items() if value is not None}


def _build(gguf: GGUF, tokens: list[str]) -> Tokenizer:
    from tokenizers import AddedToken, processors

    families = {"gpt2": _byte_level, "llama": _sentencepiece}
    family = _field(gguf, "model")
    if family not in families:
        raise ValueError(f"[gguf] unsupported tokenizer; got {family!r}; try a file with one of {', '.join(families)}")
    types = _field(gguf, "token_type")
    tokenizer = families[family](gguf, tokens, types)
    bos = _id(gguf, "bos")
    if bos is not None and _adds_bos(gguf):
        first = tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first}:0 $A:0", pair=f"{first}:0 $A:0 {first}:1 $B:1", special_tokens=[(first, bos)]
        )
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def _byte_level(gguf: GGUF, tokens: list[str], types: list[int]) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    merges = [tuple(merge.split(" ")) for merge in _field(gguf, "merges")]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = _split(gguf.fields.get("tokenizer.ggml.pre", "gpt-2"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    own = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in own])
    return tokenizer


def _split(name: str) -> Any:
    """The pre-tokenizer that llama.cpp calls ``name``."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name != "llama-bpe")
    before = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")],
    }
    if name not in before:
        raise ValueError(f"[gguf] unsupported pre-tokenizer; got {name!r}; try a file with one of {', '.join(before)}")
    return pre_tokenizers.Sequence([*before[name], byte_level])


def _sentencepiece(gguf: GGUF, tokens: list[str], types: list[int]) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    prefix = bool(gguf.fields.get("tokenizer.ggml.add_space_prefix", True))
    vocabulary = {token: id for id, token in enumerate(tokens)}
    unknown = _id(gguf, "unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges(tokens, types, _field(gguf, "scores"), vocabulary),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else tokens[unknown],
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    own = [t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED and "▁" not in t]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in own])
    return tokenizer


def _merges(tokens: list[str], types: list[int], scores: list[float], vocabulary: dict[str, int]) -> list[Any]:
    """The merges of a SentencePiece vocabulary: every split of a piece into two pieces, best scores first."""
    found = []
    for id, piece in enumerate(tokens):
        if types[id] not in (NORMAL, USER_DEFINED):
            continue
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        halves = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        halves.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        score = scores[id] if types[id] == NORMAL else 0.0
        found += [(score, pair) for pair in halves]
    found.sort(key=lambda item: -item[0])
    return [pair for _, pair in found]
