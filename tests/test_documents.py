"""Reading files, and what a prompt is made of."""

import io
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import tiny_models as zoo

import mlx_kvprune as kvp
from mlx_kvprune.attach import make_from_settings, settings_from
from mlx_kvprune.context import placed
from mlx_kvprune.documents import Prompt, prefill, prompt_for, read, settings_for
from mlx_kvprune.forward import pruned
from mlx_kvprune.ladder import trained_context
from mlx_kvprune.settings import CacheSettings


class Letters:
    """A tokenizer of one token per character, with a template that frames the user's words."""

    chat_template = "yes"

    def encode(self, text, add_special_tokens=True):
        return [ord(c) % 128 for c in text]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "<user>" + messages[0]["content"] + "<assistant>"


def pdf(text: str) -> bytes:
    """A PDF of one page."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = "%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    out += f"xref\n0 6\n0000000000 65535 f \n{table}trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF"
    return out.encode()


def test_a_pdf_is_read(tmp_path):
    path = tmp_path / "page.pdf"
    path.write_bytes(pdf("The pedlar bought salt."))
    assert read(path) == "The pedlar bought salt."


@pytest.mark.parametrize("data", ["naïve ☃\r\ntext".encode("utf-8-sig"), "naïve ☃\r\ntext".encode("utf-16")])
def test_encodings_and_line_ends(tmp_path, data):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    assert read(path) == "naïve ☃\ntext"


def test_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b" piped ")))
    assert read("-") == "piped"


def test_the_question_stands_before_and_after_the_document():
    text = "".join(map(chr, [c for part in parts(pinned=True) for c in part]))
    assert text.count("Who ran?") == 2
    before, after = text.split("A mouse ran.")
    assert "Who ran?" in before
    assert after.endswith("Who ran?<assistant>")
    unknown = "".join(map(chr, parts(pinned=False)[0]))
    assert "Who ran?" not in unknown


def parts(pinned):
    prompt = prompt_for(Letters(), "A mouse ran.", "Who ran?", pinned=pinned)
    return prompt.before, prompt.document, prompt.after


def test_what_stands_before_the_document_is_pinned_and_probe_has_its_question():
    prompt = prompt_for(Letters(), "A mouse ran.", "Who ran?", pinned=True)
    probing = settings_for(settings_from(policy="probe", budget=999), prompt)
    assert probing.n_sink == len(prompt.before)
    assert probing.question == tuple(prompt.after)
    assert settings_for(settings_from(policy="window", budget=999), prompt).question == ()


def test_pinned_tokens_are_held_to_the_end():
    model = zoo.tiny_model("llama")
    cache = kvp.make_cache(model, policy="window", budget=120, n_sink=30, window=16, block=16)
    prefill(model, list(range(100)) * 3, cache, step=64)
    positions = pruned(cache)[0].held.positions()[0, 0].tolist()
    assert set(range(30)) <= set(positions)
    kvp.detach(model)


def test_too_long_for_the_model_is_refused():
    model = zoo.tiny_model("llama")
    limit = trained_context(model)
    assert limit == 512
    prompt = prompt_for(Letters(), "x" * 500, "Who?", pinned=False)
    kvp.attach(model, quiet=True)
    text, auto = CacheSettings(budget=256), CacheSettings(budget=256, positions="auto")
    with pytest.raises(ValueError, match=r"the limit is 512; try .* or --positions cache"):
        placed(model, text, prompt.n_tokens, 10, "ask")
    assert placed(model, text, 500, 10, "ask") == text
    assert placed(model, auto, 500, 10, "ask").positions == "text"
    assert placed(model, auto, 500, 13, "ask").positions == "cache"
    assert placed(model, auto.but(budget=4096), 500, 13, "ask").positions == "cache", "of which it uses 512"
    with pytest.raises(ValueError, match=r"the budget has no bound; .* or --budget 512"):
        placed(model, auto.but(budget=None), 500, 13, "ask")
    with pytest.raises(ValueError, match="policy full keeps everything"):
        placed(model, auto.but(policy="full"), 500, 13, "ask")
    kvp.detach(model)


def test_prefill_reports_progress():
    model, seen = zoo.tiny_model("llama"), []
    cache = kvp.make_cache(model, budget=200)
    prefill(model, list(range(100)), cache, step=40, progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(40, 100), (80, 100), (100, 100)]
    assert mx.array(pruned(cache)[0].offset) == 100
    kvp.detach(model)


@pytest.mark.parametrize("allocator", ["global", "head_adaptive"])
def test_no_head_holds_more_than_the_model_was_trained_for(allocator):
    """One head wins every contest; positions in the cache must still be ones that the model knows."""
    model = zoo.tiny_model("llama")
    kvp.attach(model, quiet=True)
    settings = settings_from(policy="knorm", budget=450, allocator=allocator, positions="auto", head_floor=0.0)
    chosen = placed(model, settings, 1200, 10, "ask")
    assert chosen.positions == "cache"
    for layer in model.layers:  # one head's keys are small
        weight = layer.self_attn.k_proj.weight
        layer.self_attn.k_proj.weight = mx.concatenate([weight[:32] * 1e-3, weight[32:]])
    cache = make_from_settings(model, chosen)
    prefill(model, np.random.default_rng(0).integers(0, 128, 1200).tolist(), cache, step=100)
    limit = trained_context(model)
    most = max(int((np.array(c.held.positions()[0]) >= 0).sum(axis=-1).max()) for c in pruned(cache))
    assert 450 < most <= limit
    assert all(c.offset <= limit for c in pruned(cache))
    kvp.detach(model)


@pytest.mark.parametrize(
    ("allocator", "budget", "more"),
    [
        ("pyramid", 450, {}),
        ("uniform", 4096, {}),
        ("global", 4096, {}),
        ("uniform", "2MB", {}),
        ("head_adaptive", "2MB", {}),
        ("global", "2MB", {"kv_fine_tokens": 32, "kv_bits": 8, "kv_group_size": 32, "kv_fine_bits": None}),
        ("uniform", 450, {"local_layers": "0"}),
    ],
)
def test_no_layer_holds_more_than_the_model_was_trained_for(allocator, budget, more):
    """Budgets that say nothing of a layer's slots: bytes, falling with depth, those that local layers leave free."""
    model = zoo.tiny_model("llama")
    kvp.attach(model, quiet=True)
    settings = settings_from(policy="knorm", budget=budget, allocator=allocator, positions="auto", **more)
    chosen = placed(model, settings, 1200, 10, "ask")
    assert chosen.positions == "cache"
    cache, limit = make_from_settings(model, chosen), trained_context(model)
    prefill(model, np.random.default_rng(0).integers(0, 128, 1200).tolist(), cache, step=100)
    most = [int((np.array(c.held.positions()[0]) >= 0).sum(axis=-1).max()) for c in pruned(cache)]
    assert 450 < max(most) <= limit and all(c.evicted for c in pruned(cache))
    kvp.detach(model)


def test_a_window_beyond_the_trained_context():
    model = zoo.tiny_model("llama")
    with pytest.raises(
        ValueError, match=r"\[positions\] .* need 537 slots.* 512 positions; got a window of 500; try a"
    ):
        kvp.attach(model, budget=2000, window=500, positions="cache", quiet=True)


@pytest.mark.parametrize("policy", ["probe", "spkv", "dms", "retention_probe", "window"])
@pytest.mark.parametrize("pinned", [0, 45, 200, 430])
def test_the_block_leaves_room_for_what_is_pinned(policy, pinned):
    """A budget is refused only where not even the shortest block fits beside the pinned tokens."""
    prompt = Prompt([1] * pinned, [2] * 9, [3] * 5)
    window = settings_from(policy=policy, budget=4096).window
    least = max(4, pinned) + window + 32 + settings_from(policy=policy, budget=4096).smallest_pool
    for budget in range(max(least - 1, window + 70), least + 400, 3):
        settings = settings_for(settings_from(policy=policy, budget=budget), prompt)
        assert (settings.smallest_budget <= budget) == (least <= budget), (budget, settings.block)
    asked = settings_for(settings_from(policy=policy, budget=2048, block=64), prompt)
    assert asked.block == 64, "a block that was asked for stays"


class Page:
    def extract_text(self):
        return "broken \ud835 map"


class Locked:
    is_encrypted = True

    @property
    def pages(self):
        raise RuntimeError("File has not been decrypted")


def test_a_pdf_with_broken_characters_and_one_with_a_password(tmp_path, monkeypatch):
    pypdf = pytest.importorskip("pypdf")
    path = tmp_path / "a.pdf"
    path.write_bytes(b"%PDF-1.7 ...")
    monkeypatch.setattr(pypdf, "PdfReader", lambda data: SimpleNamespace(is_encrypted=False, pages=[Page()]))
    assert read(path).encode() and read(path).startswith("broken ")
    monkeypatch.setattr(pypdf, "PdfReader", lambda data: Locked())
    with pytest.raises(ValueError, match=r"asks for a password; got File has not been decrypted; try"):
        read(path)
