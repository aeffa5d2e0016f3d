"""GGUF files become directories that stock mlx-lm loads, with the numbers that llama.cpp's package reads in them."""

from __future__ import annotations

import json
import sys
from itertools import chain, pairwise, product

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_gguf
from gguf import GGUFReader
from gguf.quants import dequantize
from mlx.utils import tree_flatten

from mlx_kvprune import gguf, gguf_reader, gguf_tokenizer

TOKENS = mx.array([[1, 5, 9, 200, 17, 33, 6, 8, 90, 41, 12, 3, 77, 250]])  # longer than gemma3's window of 8


def converted(written, folder, dtype, **options):
    """The directory made of a tiny GGUF, and what stock mlx-lm loads from it."""
    folder.mkdir()
    gguf.convert(gguf_reader.read(written.path), folder, dtype, **options)
    return mlx_lm.load(str(folder))


def difference(a, b):
    """The largest difference of two arrays, relative to the largest value."""
    a, b = np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])
def test_values_are_those_of_the_gguf_package(tmp_path, kind):
    written = tiny_gguf.write(tmp_path / "tiny.gguf", kind=kind, width=256)
    ours = gguf_reader.read(written.path)
    theirs = GGUFReader(written.path)
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    assert kind in {tensor.kind for tensor in ours.tensors.values()}
    for tensor in theirs.tensors:
        expected = dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.tensors[tensor.name].float32(), expected)


def test_metadata_is_that_of_the_gguf_package(tmp_path):
    written = tiny_gguf.write(tmp_path / "tiny.gguf", "gemma3")
    ours, theirs = gguf_reader.read(written.path), GGUFReader(written.path)
    read = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.fields == read
    assert ours.fields["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_those_that_mlx_reads(tmp_path, kind):
    written = tiny_gguf.write(tmp_path / "tiny.gguf", "gemma3", kind)  # gemma3: rows keep their order
    source, expected = gguf_reader.read(written.path), mx.load(str(written.path))
    for name, tensor in source.tensors.items():
        if tensor.kind != "F32":
            ours = gguf._packed(source, name.removesuffix(".weight"), tensor, "float16")
            assert all(mx.array_equal(value, expected[key]) for key, value in ours.items())


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_logits_are_those_of_the_model_in_the_file(tmp_path, architecture, kind):
    written = tiny_gguf.write(tmp_path / "tiny.gguf", architecture, kind, width=256)
    model, _ = converted(written, tmp_path / "out", "float32")
    assert difference(model(TOKENS), written.model(TOKENS)) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_4bit_keeps_the_blocks_exactly(tmp_path, architecture, kind):
    written = tiny_gguf.write(tmp_path / "tiny.gguf", architecture, kind)
    model, _ = converted(written, tmp_path / "out", "4bit")
    assert model.model.layers[0].mlp.up_proj.bits == (8 if kind == "Q8_0" else 4)
    assert model.model.embed_tokens.bits == 8
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert quantization["bits"] == 4
    assert quantization["model.embed_tokens"]["bits"] == 8
    assert difference(model(TOKENS), written.model(TOKENS)) < 1e-5
    for name, module in model.named_modules():
        if hasattr(module, "bits"):
            unpacked = mx.dequantize(module.weight, module.scales, module.biases, 32, module.bits)
            expected = dict(written.model.named_modules())[name].weight
            assert mx.array_equal(unpacked, expected)


def test_4bit_leaves_other_matrices_dense(tmp_path):
    """A file of K-quants has a Q8_0 embedding: only that is packed, and the rest is as under float32."""
    written = tiny_gguf.write(tmp_path / "tiny.gguf", kind="Q4_K", width=256)
    model, _ = converted(written, tmp_path / "out", "4bit")
    assert model.model.embed_tokens.bits == 8
    assert model.model.layers[0].mlp.up_proj.weight.dtype == mx.float32
    assert difference(model(TOKENS), written.model(TOKENS)) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "4bit"])
def test_half_types_are_the_rounded_weights(tmp_path, architecture, dtype):
    """Compared in float32: a half forward pass of a random model says little."""
    written = tiny_gguf.write(tmp_path / "tiny.gguf", architecture, "Q4_1")
    model, _ = converted(written, tmp_path / "out", dtype, scales="float16")
    half = mx.bfloat16 if dtype == "bfloat16" else mx.float16
    assert model(TOKENS).dtype == half
    rounded = [
        (name, value if dtype == "4bit" and value.ndim > 1 else value.astype(half).astype(mx.float32))
        for name, value in tree_flatten(written.model.parameters())
    ]
    written.model.load_weights(rounded)
    model.set_dtype(mx.float32)
    assert difference(model(TOKENS), written.model(TOKENS)) < 1e-5


def test_untied_output(tmp_path):
    written = tiny_gguf.write(tmp_path / "tiny.gguf", tied=False)
    model, _ = converted(written, tmp_path / "out", "float32")
    assert not mx.array_equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert difference(model(TOKENS), written.model(TOKENS)) < 1e-5


def test_cached_decoding_matches_one_pass(tmp_path):
    """Positions, windows and masks: token by token through mlx-lm's own caches."""
    from mlx_lm.models.cache import make_prompt_cache

    written = tiny_gguf.write(tmp_path / "tiny.gguf", "gemma3")
    model, _ = converted(written, tmp_path / "out", "float32")
    cache = make_prompt_cache(model)
    steps = [model(TOKENS[:, i : i + 1], cache=cache) for i in range(TOKENS.shape[1])]
    assert difference(mx.concatenate(steps, axis=1), written.model(TOKENS)) < 1e-5


def test_progress_counts_tensors(tmp_path):
    written = tiny_gguf.write(tmp_path / "tiny.gguf")
    seen = []
    converted(written, tmp_path / "out", "float32", progress=lambda *step: seen.append(step))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    assert len(seen) == len(gguf_reader.read(written.path).tensors)


@pytest.mark.parametrize(
    ("kind", "own"), [("Q4_1", "4bit"), ("Q8_0", "4bit"), ("F16", "bfloat16"), ("Q4_K", "bfloat16")]
)
def test_own_dtype(tmp_path, kind, own):
    written = tiny_gguf.write(tmp_path / "tiny.gguf", kind=kind, width=256)
    assert gguf.own_dtype(gguf_reader.read(written.path)) == own


# Tokenizers


@pytest.mark.parametrize(
    "text", [tiny_gguf.TEXT, "the cat\n\n  sat", "1234 hats", "🙂 emoji", "", "<|start|>the<|end|>"]
)
def test_byte_level_tokenizer_is_the_one_in_the_file(tmp_path, text):
    written = tiny_gguf.write(tmp_path / "tiny.gguf")
    _, tokenizer = converted(written, tmp_path / "out", "float32")
    assert tokenizer.encode(text) == tiny_gguf.trained().encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def sentencepiece(text, ranks):
    """SentencePiece's own algorithm: merge the neighbours whose union scores best; what is unknown goes in bytes."""
    parts = list(text.replace(" ", "▁"))
    while pairs := [(ranks[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    spelled = ([part] if part in ranks else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts)
    return list(chain.from_iterable(spelled))


@pytest.mark.parametrize(
    ("architecture", "text"),
    [
        *product(["llama", "gemma3"], ["the cat sat on the mat", "that cat,  and the hat.", "é 日"]),
        ("gemma3", "cat<turn>sat"),  # llama puts a space after such tokens, as llama.cpp does
    ],
)
def test_sentencepiece_tokenizer(tmp_path, architecture, text):
    written = tiny_gguf.write(tmp_path / "tiny.gguf", architecture, tokenizer="llama")
    _, tokenizer = converted(written, tmp_path / "out", "float32")
    ids = tokenizer.encode(text)
    assert ids[0] == written.tokens.index("<bos>")
    assert tokenizer.decode(ids[1:]) == text
    assert ("<turn>" in text) == (written.tokens.index("<turn>") in ids)
    if "<turn>" not in text:
        tokens, scores, types = tiny_gguf.pieces()
        ranks = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == 1}
        expected = sentencepiece((" " if architecture == "llama" else "") + text, ranks)
        assert [written.tokens[id] for id in ids[1:]] == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", ["It", "'s", "Ġ1234", "Ġx", ".", "ĊĊ"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġx", ".", "ĊĊ"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "Ġx", ".ĊĊ"]),
    ],
)
def test_pre_tokenizers(name, expected):
    assert [piece for piece, _ in gguf_tokenizer._split(name).pre_tokenize_str("It's 1234 x.\n\n")] == expected


def test_settings_of_the_tokenizer(tmp_path):
    written = tiny_gguf.write(tmp_path / "tiny.gguf")
    _, tokenizer = converted(written, tmp_path / "out", "float32")
    assert tokenizer.eos_token_ids == {0}
    assert tokenizer.bos_token == "<|start|>"
    messages = [{"role": "user", "content": "cat"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|user|>cat"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": 0,
        "bos_token_id": 1,
    }


# Bad input


def one_line(error):
    """The message of a ValueError that a user may see: one line, of the house's form."""
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("[")
    assert "; got " in text
    assert "; try " in text
    return text


@pytest.mark.parametrize("keep", [0, 3, 10, 60, 2000, 9000, -1])
def test_truncated_file(tmp_path, keep):
    path = tiny_gguf.write(tmp_path / "tiny.gguf").path
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"^\[gguf\]") as error:
        gguf_reader.read(path)
    message = one_line(error)
    assert "tiny.gguf" in message
    assert keep < 10 or " bytes " in message  # says where it ends


def with_alignment(path, alignment):
    """A tiny file that says how its tensors are aligned: the number at its place behind the key and its type."""
    written = tiny_gguf.write(path, alignment=64)
    data, key = bytearray(path.read_bytes()), b"general.alignment"
    at = data.index(key) + len(key) + 4
    data[at : at + 4] = alignment.to_bytes(4, "little")
    path.write_bytes(data)
    return written


def test_alignment(tmp_path):
    written = with_alignment(tmp_path / "tiny.gguf", 64)
    norm = gguf_reader.read(written.path).tensors["output_norm.weight"].float32()
    assert np.array_equal(norm, np.array(written.model.model.norm.weight))
    with pytest.raises(ValueError, match=r"tiny\.gguf is damaged") as error:
        gguf_reader.read(with_alignment(tmp_path / "tiny.gguf", 0).path)
    one_line(error)


def test_random_damage_is_an_error_or_harmless(tmp_path):
    """Flips in the header: never another exception than ValueError, never a hang."""
    path = tiny_gguf.write(tmp_path / "tiny.gguf").path
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    failures = []
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, 9000, 3):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            gguf_reader.read(path)
        except ValueError as error:
            failures.append(str(error))
    assert len(failures) > 30
    assert all(failure.startswith("[gguf]") for failure in failures)


def test_no_gguf(tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(b"PK\3\4" + b"\3\0\0\0" + bytes(100))
    with pytest.raises(ValueError, match="is no GGUF file") as error:
        gguf_reader.read(path)
    assert "b'PK" in one_line(error)
    with pytest.raises(ValueError, match="cannot read") as error:
        gguf_reader.read(tmp_path / "absent.gguf")
    one_line(error)


def refused(written, folder, dtype="float32"):
    folder.mkdir()
    with pytest.raises(ValueError, match=r"^\[gguf\]") as error:
        gguf.convert(gguf_reader.read(written.path), folder, dtype)
    return one_line(error)


def test_unsupported_architecture(tmp_path):
    written = tiny_gguf.write(tmp_path / "tiny.gguf")
    data = written.path.read_bytes().replace(b"llama", b"mamba")
    written.path.write_bytes(data)
    message = refused(written, tmp_path / "out")
    assert "'mamba'" in message
    assert "llama, gemma3" in message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "deepseek-llm"),
        ({"tokenizer.ggml.model": "bert"}, "bert"),
    ],
)
def test_unsupported_fields(tmp_path, fields, named):
    path = tmp_path / "tiny.gguf"
    written = tiny_gguf.write(path)
    source = gguf_reader.read(path)
    source.fields.update(fields)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=named) as error:
        gguf.convert(source, tmp_path / "out", "float32")
    one_line(error)
    assert written.tokens


@pytest.mark.parametrize("missing", ["llama.block_count", "llama.attention.head_count", "tokenizer.ggml.merges"])
def test_missing_metadata(tmp_path, missing):
    source = gguf_reader.read(tiny_gguf.write(tmp_path / "tiny.gguf").path)
    del source.fields[missing]
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=missing) as error:
        gguf.convert(source, tmp_path / "out", "float32")
    one_line(error)


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "blk.0.attn_q.bias", "rope_freqs.weight", "v.weight"])
def test_unknown_tensor(tmp_path, name):
    source = gguf_reader.read(tiny_gguf.write(tmp_path / "tiny.gguf").path)
    source.tensors[name] = source.tensors["output_norm.weight"]
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=name) as error:
        gguf.convert(source, tmp_path / "out", "float32")
    one_line(error)


def test_damaged_vocabulary(tmp_path):
    source = gguf_reader.read(tiny_gguf.write(tmp_path / "tiny.gguf").path)
    source.fields["tokenizer.ggml.tokens"][250] = source.fields["tokenizer.ggml.tokens"][251]
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer in tiny\.gguf is damaged") as error:
        gguf.convert(source, tmp_path / "out", "float32")
    one_line(error)


def test_a_broken_merge(tmp_path):
    """Of which the tokenizers' library says so by an exception of no kind."""
    source = gguf_reader.read(tiny_gguf.write(tmp_path / "tiny.gguf").path)
    source.fields["tokenizer.ggml.merges"][0] = "nobody knows"
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer in tiny\.gguf is damaged.* try to download it again") as error:
        gguf.convert(source, tmp_path / "out", "float32")
    one_line(error)


@pytest.mark.parametrize(
    ("architecture", "harm", "said"),
    [
        (
            "llama",
            lambda s: s.fields.update({"split.count": 2}),
            "a piece of a file that was split; got one of 2; try llama",
        ),
        ("llama", lambda s: s.tensors.pop("blk.1.attn_q.weight"), "lacks tensors; got none of layer 1 of 2"),
        (
            "llama",
            lambda s: s.fields.update({"llama.attention.head_count": 5}),
            r"got 64 rows of model.layers.0.*for 5 heads",
        ),
        ("gemma3", lambda s: s.fields.pop("gemma3.attention.sliding_window"), "got no gemma3.attention.sliding_window"),
    ],
)
def test_files_that_are_not_whole(tmp_path, architecture, harm, said):
    source = gguf_reader.read(tiny_gguf.write(tmp_path / "tiny.gguf", architecture).path)
    harm(source)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=said) as error:
        gguf.convert(source, tmp_path / "out", "float32")
    one_line(error)


def test_unknown_dtype_and_no_blocks(tmp_path):
    written = tiny_gguf.write(tmp_path / "tiny.gguf")
    assert "'int3'" in refused(written, tmp_path / "a", "int3")
    assert "no blocks that 4bit could keep; got F32" in refused(written, tmp_path / "b", "4bit")


def test_unknown_tensor_type(tmp_path, monkeypatch):
    path = tiny_gguf.write(tmp_path / "tiny.gguf", kind="Q4_1").path
    monkeypatch.delitem(gguf_reader.KINDS, 3)
    with pytest.raises(ValueError, match="got type 3") as error:
        gguf_reader.read(path)
    one_line(error)


def test_k_quants_without_the_gguf_package(tmp_path, monkeypatch):
    written = tiny_gguf.write(tmp_path / "tiny.gguf", kind="Q6_K", width=256)
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    assert "needs the gguf package" in refused(written, tmp_path / "out")


def test_other_types_need_no_gguf_package(tmp_path, monkeypatch):
    written = tiny_gguf.write(tmp_path / "tiny.gguf", kind="Q4_1")
    for name in ("gguf", "gguf.quants", "gguf.constants"):
        monkeypatch.setitem(sys.modules, name, None)
    converted(written, tmp_path / "out", "float32")
