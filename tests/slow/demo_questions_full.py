"""Asks the demo's ten questions with the stock, unbounded cache, under several prompt templates, and prints a table.

    OPENBLAS_NUM_THREADS=1 python tests/slow/demo_questions_full.py --model DIR [--templates both] [--around N] [--json OUT]

The document is longer than the model was trained for: a question gets the fable that answers it, or N tokens of the document
with that fable in the middle. Greedy decoding, 40 new tokens. `closed` gives no document: what it gets right is no reading.
An answer is right if one of the accepted strings stands in it as a word, in lower case.
"""

import argparse
import json
import re
import time
from pathlib import Path

from mlx_kvprune import blas

blas.preload()

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache  # noqa: E402

DOCUMENTS = Path(__file__).resolve().parents[2] / "examples" / "documents"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
NEW_TOKENS = 40

BEFORE = "Read the document and answer the question.\nQuestion: {question}\n\nDocument:\n{document}\n\n"
AFTER = "Read the document and answer the question.\n\nDocument:\n{document}\n\n"
BRIEF = "Question: {question}\nAnswer briefly."
WORDS = "According to the document, answer this question in a few words: {question}"

# name: (system prompt or None, user message, start of the assistant's message); the demo's is `both-words`
TEMPLATES = {
    "both": (SYSTEM, BEFORE + BRIEF, ""),
    "both-words": (SYSTEM, BEFORE + WORDS, ""),
    "both-prefix": (SYSTEM, BEFORE + BRIEF, "Answer:"),
    "after": (SYSTEM, AFTER + BRIEF, ""),
    "after-words": (SYSTEM, AFTER + WORDS, ""),
    "after-prefix": (SYSTEM, AFTER + BRIEF, "Answer:"),
    "after-nosystem": (None, AFTER + BRIEF, ""),
    "closed": (SYSTEM, BRIEF, ""),
}


def render(template: str, question: str, document: str) -> str:
    system, user, start = TEMPLATES[template]
    head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    user = user.format(question=question, document=document)
    return f"{head}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{start}"


def is_right(answer: str, accepted: list[str]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(a)}(?!\w)", answer.lower()) for a in accepted)


def fable(document: str, title: str) -> str:
    """One fable of the document, with its title."""
    parts = re.split(r"\n\n(?=[A-Z][A-Z ,'-]+\n\n)", document)
    return next(part for part in parts if part.split("\n")[0] == title)


class Reader:
    """Greedy decoding with one stock cache; keeps what two prompts in a row have in common."""

    def __init__(self, path: str):
        self.model, self.tokenizer = mlx_lm.load(path)
        self.cache = make_prompt_cache(self.model)
        self.held: list[int] = []

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def around(self, document: str, part: str, tokens: int) -> str:
        """``tokens`` of the document with ``part`` in the middle."""
        start = document.index(part)
        before, middle, after = (self.encode(x) for x in (document[:start], part, document[start + len(part) :]))
        room = max(0, tokens - len(middle))
        left = min(len(before), max(room // 2, room - len(after)))
        return self.tokenizer.decode(before[len(before) - left :] + middle + after[: room - left]).strip()

    def answer(self, prompt: str) -> tuple[str, float, float]:
        ids = self.encode(prompt)
        start = time.perf_counter()
        same = 0
        while same < min(len(self.held), len(ids) - 1) and self.held[same] == ids[same]:
            same += 1
        trim_prompt_cache(self.cache, len(self.held) - same)
        self.held, rest = ids[:same], ids[same:]
        while len(rest) > 1:
            chunk, rest = rest[: min(512, len(rest) - 1)], rest[min(512, len(rest) - 1) :]
            self.model.model(mx.array([chunk]), cache=self.cache)
            mx.eval([c.state for c in self.cache])
            self.held += chunk
        read = time.perf_counter()
        token, out = rest[0], []
        while len(out) < NEW_TOKENS:
            logits = self.model(mx.array([[token]]), cache=self.cache)
            self.held.append(token)
            token = int(mx.argmax(logits[0, -1]).item())
            if token in self.tokenizer.eos_token_ids:
                break
            out.append(token)
        return self.tokenizer.decode(out).strip(), read - start, time.perf_counter() - read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="directory of an mlx-lm model (SmolLM2-135M-Instruct, float32)")
    parser.add_argument("--document", default=str(DOCUMENTS / "aesop-fables.txt"))
    parser.add_argument("--questions", default=str(DOCUMENTS / "questions.json"))
    parser.add_argument("--templates", default=",".join(TEMPLATES))
    parser.add_argument("--around", type=int, default=0, help="tokens of the document; 0 is the fable alone")
    parser.add_argument("--json", help="write every answer to this file")
    args = parser.parse_args()

    document = Path(args.document).read_text(encoding="utf-8").strip()
    questions = json.loads(Path(args.questions).read_text(encoding="utf-8"))
    names = args.templates.split(",")
    reader = Reader(args.model)
    print(f"{Path(args.document).name}: {len(reader.encode(document))} tokens")

    order = [(t, i) for i in range(len(questions)) for t in names]  # what shares a prefix goes together
    rows = []
    for template, i in order:
        item = questions[i]
        part = fable(document, item["fable"])
        part = reader.around(document, part, args.around) if args.around else part
        text, read_s, decode_s = reader.answer(render(template, item["question"], part))
        right = is_right(text, item["answers"])
        rows.append({"template": template, **item, "text": text, "right": right, "read_s": round(read_s, 2)})
        verdict, shown = "right" if right else "wrong", " ".join(text.split())
        print(f"{template:15} {verdict} {read_s:6.1f}s {decode_s:5.1f}s  {item['question']} | {shown}", flush=True)
    for template in names:
        mine = [r["right"] for r in rows if r["template"] == template]
        print(f"{template:15} {sum(mine)} of {len(mine)}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
