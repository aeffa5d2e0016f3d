"""Hold our conversion of a GGUF against llama.cpp on the same file: teacher-forced logits, and greedy continuations.

    python tests/slow/llama_cpp_check.py TEXT --llama-python OTHER_ENV/bin/python [--model smollm2-135m] [--tokens 500]

llama-cpp-python is a source build of many minutes, hence in an environment of its own and no part of the test suite.
TEXT is a plain text, or a ``.jsonl.gz`` with a field ``text``. Two runs: the file as it is, where llama.cpp rounds the
activations to 8 bits before every product with quantized weights, and the same file with all its weights as float32,
where what is left are rounding errors: that one judges the conversion. Exit code 1 if it fails.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

# Mean KL in nats a token that float32 weights may show. mlx-lm (as transformers) rounds the factor sqrt(hidden size) on
# Gemma's embedding to bfloat16, llama.cpp does not: 0.2% of the embedding, and nearly all of the difference.
MEAN_KL = {"llama": 1e-9, "gemma3": 2e-5}
GREEDY = 100  # tokens of the continuation


def dump(path: str, asked: str, out: str) -> None:
    """In the other environment: logits of the tokens in ``asked`` ``(L, V)``, tokens of its text, a continuation."""
    from llama_cpp import GGML_TYPE_F32, Llama  # pyright: ignore[reportMissingImports]

    question = json.loads(Path(asked).read_text(encoding="utf-8"))
    tokens, count = question["tokens"], len(question["tokens"])
    room = count + GREEDY
    llama = Llama(
        path,
        n_ctx=room,
        n_batch=room,
        n_threads=1,
        logits_all=True,
        verbose=False,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
    )
    llama.eval(tokens)
    logits = np.array(llama.scores[:count])
    own = llama.tokenize(question["text"].encode(), add_bos=question["bos"], special=True)
    llama.reset()
    start = tokens[: count // 2]
    llama.eval(start)
    told = []
    for _ in range(GREEDY):
        told.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(told[-1:])
    np.savez(out, logits=logits, own=np.array(own), told=np.array(told))


def as_float32(source: Path, out: Path) -> None:
    """The same GGUF with float32 weights, written by llama.cpp's own package."""
    import gguf
    from gguf.quants import dequantize

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_text(path: Path) -> str:
    if path.suffix != ".gz":
        return path.read_text(encoding="utf-8")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return json.loads(next(lines))["text"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """KL(theirs || ours) in nats and greedy tokens of logits ``(L, V)``; a margin is that of our two best logits."""
    p, q = log_softmax(theirs), log_softmax(ours)
    kl = (np.exp(p) * (p - q)).sum(-1)
    error = np.abs(p - q).max(-1)
    best = np.sort(ours, -1)[:, -2:]
    margin = best[:, 1] - best[:, 0]
    differ = ours.argmax(-1) != theirs.argmax(-1)
    return {
        "tokens": len(ours),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "logit_error_mean": error.mean(),
        "logit_error_max": error.max(),
        "top1_agreement": 1 - differ.mean(),
        "greedy_differences": int(differ.sum()),
        "margins_there": [round(float(value), 5) for value in margin[differ]],
        "unexplained": int((differ & (margin > 2 * error)).sum()),
    }


def ask(python: str, path: Path, question: dict[str, object]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        asked, out = Path(folder, "asked.json"), Path(folder, "out.npz")
        asked.write_text(json.dumps(question), encoding="utf-8")
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([python, __file__, "--dump", str(path), str(asked), str(out)], check=True, env=env)
        with np.load(out) as arrays:
            return dict(arrays)


def continuation(model, tokens: list[int]) -> list[int]:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(tokens), model, max_tokens=GREEDY)
    return [int(token) for token, _ in steps]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--skip", type=int, default=20_000, help="characters before the passage")
    args = parser.parse_args()

    from mlx_kvprune import blas, models

    blas.preload()
    import mlx.core as mx

    model, tokenizer = models.load(args.model, dtype="float32")
    card = next(card for card in models.known_models() if card.name == args.model)
    source = models.cache_dir() / "downloads" / card.source.file
    text = read_text(args.text)[args.skip : args.skip + 10 * args.tokens]
    ids = tokenizer.encode(text)
    bos = ids[0] == tokenizer.bos_token_id
    tokens = ids[: args.tokens]
    question = {"tokens": tokens, "text": text, "bos": bos}
    ours = np.array(model(mx.array([tokens]))[0])
    told = continuation(model, tokens[: len(tokens) // 2])

    failed = False
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder, "float32.gguf")
        as_float32(source, dense)
        for name, path in (("as it is", source), ("float32", dense)):
            theirs = ask(args.llama_python, path, question)
            found = compare(ours, theirs["logits"])
            found["tokenizers_agree"] = theirs["own"].tolist() == ids
            same = np.array(told) == theirs["told"]
            found["greedy_continuation_equal"] = f"{len(same) if same.all() else int(same.argmin())} of {len(same)}"
            print(json.dumps({"model": args.model, "weights": name, **found}))
            failed |= bool(found["unexplained"]) or not found["tokenizers_agree"]
            failed |= name == "float32" and found["kl_mean"] > MEAN_KL[card.architecture]
    return int(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--dump"]:
        dump(*sys.argv[2:])
    else:
        sys.exit(main())
