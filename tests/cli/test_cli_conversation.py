"""What is in the cache is what the chat template says of the whole conversation, whatever the user does."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from cli_helpers import TEMPLATE, tiny_llama

from mlx_kvprune import session
from mlx_kvprune.attach import settings_from
from mlx_kvprune.cli import saved
from mlx_kvprune.cli.cache_options import endless
from mlx_kvprune.cli.commands import changed
from mlx_kvprune.cli.conversation import Conversation
from mlx_kvprune.cli.options import SamplingOptions
from mlx_kvprune.cli.stream import Stop
from mlx_kvprune.forward import pruned

END = 2
POLICIES = [("full", None), ("window", 4096), ("window", 128), ("snapkv", 128), ("surprise", 128)]


@pytest.fixture(scope="module")
def loaded(tiny):
    return mlx_lm.load(str(tiny))[:2]


def talk_with(loaded, policy="window", budget=4096, system=None, max_tokens=40, **more) -> Conversation:
    settings = settings_from(policy=policy, budget=budget, **more)
    talk = Conversation(*loaded, settings, SamplingOptions(max_tokens=max_tokens, prefill_step_size=64), system)
    talk.sampler = ends_after(47)
    return talk


def ends_after(n: int):
    """A greedy sampler that ends every n-th draw; so answers end before, at and after the limit."""
    count = iter(range(1, 1 << 30))
    return lambda logits: mx.array([END]) if next(count) % n == 0 else mx.argmax(logits, axis=-1)


def say(talk: Conversation, text: str, stop_after: int | None = None):
    stop, parts = Stop(), []

    def write(part: str) -> None:
        parts.append(part)
        stop.presses = int(stop_after is not None and len(parts) >= stop_after)

    run = talk.ask(text, write, stop)
    assert "".join(parts) == run.text
    return run


def whole(talk: Conversation) -> list[int]:
    """The tokens of the whole conversation as the template gives them, as far as they were fed."""
    tokens = talk.tokenizer.apply_chat_template(talk.messages, add_generation_prompt=False)
    return list(tokens)[: len(talk.tokens)]


def logits_after(talk: Conversation, cache) -> np.ndarray:
    """Logits of a token that follows; the caches are not used again."""
    return np.array(talk.model(mx.array([[50]]), cache=cache)[0, -1].astype(mx.float32))


def assert_consistent(talk: Conversation) -> None:
    """The text is the template's, every layer saw ``tokens[:seen]``, and the caches answer as fresh ones would."""
    assert talk.tokens == whole(talk)
    assert {getattr(c, "tokens_seen", c.offset) for c in talk.cache} == {talk.seen}
    fresh = Conversation(talk.model, talk.tokenizer, talk.settings, talk.sampling)
    fresh.tokens, fresh.messages, fresh.marks = talk.tokens[: talk.seen], talk.messages, talk.marks
    fresh.replay()
    rounding = 2e-4 if talk.settings.kv_bits is None else 0.05  # the last bit of a key may round it to the next level
    np.testing.assert_allclose(logits_after(talk, talk.cache), logits_after(talk, fresh.cache), atol=rounding)


QUANTIZED = [
    {"kv_bits": 4},
    {"kv_bits": 3, "allocator": "head_adaptive", "positions": "cache"},
    {"kv_bits": 4, "kv_scheme": "page", "allocator": "global"},
    {"kv_bits": 2, "kv_fine_tokens": 16, "allocator": "pyramid"},
]


def ends_of_turns(talk: Conversation) -> tuple[int, ...]:
    """After each answer that said something."""
    answers = [m["content"] for m in talk.messages if m["role"] == "assistant"]
    return tuple(end for end, text in zip([*talk.marks[1:], talk.seen], answers, strict=True) if text)


@pytest.mark.parametrize("policy", ["window", "knorm", "snapkv"])
@pytest.mark.parametrize("settings", [{}, *QUANTIZED], ids=str)
def test_fifty_turns_stay_under_the_cap(loaded, policy, settings):
    talk = talk_with(loaded, policy, 160, max_tokens=10, **settings)
    cap, most = 160 * talk.model.args.num_key_value_heads * len(talk.cache), 0
    for turn in range(50):
        say(talk, f"Say {turn}")
        most = max(most, sum(c.held.held() for c in talk.cache))
        assert most <= cap
        assert talk.cache[0].turns == ends_of_turns(talk)
    assert talk.seen > 10 * 160
    assert most > 0.7 * cap
    assert max(c.nbytes_peak for c in talk.cache) < talk.cache[0].nbytes_full / 4


def test_a_finished_turn_keeps_its_floor(loaded):
    """What was said first is still there in part, long after a window would have lost it."""
    kept = {}
    for floor in (0.0, 0.9):
        talk = talk_with(loaded, "window", 256, max_tokens=10, turn_floor=floor)
        say(talk, "a" * 100)
        end = talk.seen
        for _ in range(5):
            say(talk, "b" * 100)
        positions = np.array(talk.cache[0].held.positions())
        kept[floor] = ((positions >= talk.settings.n_sink) & (positions < end)).sum(axis=-1).min()
    assert kept[0.0] == 0
    assert kept[0.9] >= 0.9 * (256 - 96) / 6 - 4 - 1


@pytest.mark.parametrize("settings", QUANTIZED, ids=str)
@pytest.mark.parametrize("policy", ["knorm", "snapkv"])
def test_quantized_turns_add_up_to_the_template(loaded, policy, settings):
    talk = talk_with(loaded, policy, 160, **settings)
    for text in ("Hello, you.", "What?", "x" * 100, "Why <|im_end|> so?"):
        say(talk, text)
    assert len(talk.tokens) == talk.seen > 256
    assert_consistent(talk)


@pytest.mark.parametrize(("policy", "budget"), POLICIES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_turns_add_up_to_the_template(loaded, policy, budget, system):
    talk = talk_with(loaded, policy, budget, system)
    reasons = {say(talk, text).finish_reason for text in ("Hello, you.", "What?", "x" * 100, "Why <|im_end|> so?")}
    assert reasons == {"stop", "length"}
    assert len(talk.tokens) == talk.seen > 256
    assert [m["role"] for m in talk.messages[-2:]] == ["user", "assistant"]
    assert_consistent(talk)


def test_only_the_new_turn_is_prefilled(loaded):
    talk = talk_with(loaded)
    first = say(talk, "a" * 200)
    second = say(talk, "b")
    assert first.prompt_tokens > 200
    assert second.prompt_tokens < 60


@pytest.mark.parametrize(("policy", "budget", "bits"), [*((*p, None) for p in POLICIES), ("snapkv", 128, 4)])
def test_interrupted_answer_stays(loaded, policy, budget, bits):
    talk = talk_with(loaded, policy, budget, kv_bits=bits)
    run = say(talk, "Hello", stop_after=7)
    assert run.finish_reason == "interrupt"
    assert len(run.tokens) == 7
    assert talk.messages[-1] == {"role": "assistant", "content": run.text}
    say(talk, "And then?")
    assert_consistent(talk)


def test_interrupted_reading_goes_on_with_the_next_turn(loaded):
    talk, stop = talk_with(loaded), Stop()
    stop.presses = 1
    run = talk.ask("z" * 300, lambda text: None, stop)
    assert (run.finish_reason, run.prefilled, run.tokens, run.text) == ("interrupt", 0, [], "")
    assert talk.seen == 0 < len(talk.tokens)
    say(talk, "And then?")
    assert talk.seen == len(talk.tokens) > 300
    assert_consistent(talk)


@pytest.mark.parametrize(
    ("policy", "budget", "exact"),
    [("full", None, True), ("window", 4096, True), ("window", 128, False), ("snapkv", 4096, False)],
)
def test_rewind(loaded, policy, budget, exact):
    talk = talk_with(loaded, policy, budget)
    say(talk, "One " * 30)
    before = list(talk.tokens), list(talk.messages)
    say(talk, "Two " * 30)
    assert talk.rewind() is exact
    assert (talk.tokens, talk.messages) == before
    assert talk.seen == len(talk.tokens)
    assert_consistent(talk)


def test_rewind_past_turns_that_were_read_again(loaded):
    talk = talk_with(loaded, "knorm", 160, kv_bits=4)
    for text in ("One " * 30, "Two " * 30, "Three " * 30):
        say(talk, text)
    talk.rewind()
    assert talk.cache[0].turns == ends_of_turns(talk)
    say(talk, "Four")
    assert_consistent(talk)


def test_rewind_to_the_beginning(loaded):
    talk = talk_with(loaded, "window", 128, system="Be brief.")
    say(talk, "One " * 60)
    assert talk.rewind() is True
    assert (talk.tokens, talk.seen, talk.marks) == ([], 0, [])
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    say(talk, "Two")
    assert_consistent(talk)


def test_change_of_policy(loaded):
    talk = talk_with(loaded)
    say(talk, "One " * 60)
    talk.change(settings_from(policy="snapkv", budget=128))
    assert talk.cache[0].settings.policy == "snapkv"
    assert talk.cache[0].size() <= 128 < talk.seen
    say(talk, "Two")
    assert_consistent(talk)


def test_another_policy_has_its_own_of_what_was_not_asked_for():
    plain = changed(settings_from(policy="snapkv", budget=900), "retention")
    assert (plain.window, plain.allocator) == (16, "global")
    asked = changed(settings_from(policy="snapkv", budget=900, window=100, allocator="pyramid"), "probe", "700")
    assert (asked.window, asked.allocator, asked.budget.tokens) == (100, "pyramid", 700)
    own = settings_from(policy="snapkv", budget=900, kernel=9, positions="cache")
    assert changed(own, "snapkv", "800").options == own.options, "the same policy keeps its options"
    assert changed(own, "tova").options == ()
    assert changed(own, "full").positions == "auto"


def test_failure_in_a_forward_pass_loses_only_the_turn(loaded):
    talk = talk_with(loaded)
    say(talk, "One")
    before = list(talk.tokens), list(talk.messages), list(talk.marks)

    def broken(text: str) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        talk.ask("Two", broken, Stop())
    assert (talk.tokens, talk.messages, talk.marks) == before
    say(talk, "Three")
    assert_consistent(talk)


def test_longer_than_the_trained_context(short):
    talk = talk_with(mlx_lm.load(str(short))[:2], "window", 128, max_tokens=1000)
    talk.sampler = None  # greedy, without an end
    run = say(talk, "Hello")
    assert (run.finish_reason, len(talk.tokens)) == ("length", 300)
    before = list(talk.tokens), list(talk.messages)
    with pytest.raises(ValueError, match=r"trained context; got 300 \+ \d+ tokens, the limit is 300; try /rewind"):
        say(talk, "More")
    assert (talk.tokens, talk.messages) == before
    talk.rewind()
    assert say(talk, "Hi").tokens


def test_templates_that_rewrite_earlier_answers(tmp_path, loaded):
    trimmed = TEMPLATE.replace("message['content']", "message['content'] | trim")
    talk = talk_with(mlx_lm.load(str(tiny_llama(tmp_path / "trims", template=trimmed)))[:2])
    for text in ("One", "Two", "Three"):
        say(talk, text)
    assert {c.offset for c in talk.cache} == {len(talk.tokens)}
    rendered = talk.tokenizer.decode(talk.tokens)
    assert rendered.count("<|im_start|>user\n") == 3
    assert "<|im_end|><|im_end|>" not in rendered


def test_model_without_template(tmp_path):
    with pytest.raises(ValueError, match="needs a chat template"):
        talk_with(mlx_lm.load(str(tiny_llama(tmp_path / "base", template=None)))[:2])


# -- on disk -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "budget", "settings"), [*((*p, {}) for p in POLICIES), *(("knorm", 160, q) for q in QUANTIZED)], ids=str
)
def test_saved_and_loaded(loaded, tmp_path, policy, budget, settings):
    talk = talk_with(loaded, policy, budget, **settings)
    for text in ("One " * 60, "Two", "Three"):
        say(talk, text)
    place = saved.save(talk, str(tmp_path / "talk"))
    assert [p.name for p in tmp_path.iterdir()] == ["talk.safetensors"]
    other = talk_with(loaded)
    saved.load(other, str(place))
    assert (other.tokens, other.messages, other.marks, other.seen) == (
        talk.tokens,
        talk.messages,
        talk.marks,
        talk.seen,
    )
    assert other.settings == talk.settings
    other.sampler = talk.sampler = None
    assert say(other, "Four").text == say(talk, "Four").text
    assert_consistent(other)


def test_damaged_and_foreign_files_lose_nothing(loaded, tmp_path):
    talk = talk_with(loaded)
    say(talk, "One " * 30)
    good = saved.save(talk, str(tmp_path / "good")).read_bytes()
    flipped = bytearray(good)
    flipped[len(good) - len(good) // 4] ^= 0x40
    foreign = tmp_path / "foreign.safetensors"
    mx.save_safetensors(str(foreign), {"a": mx.zeros(3)})
    files = {"cut": good[: len(good) // 2], "flipped": bytes(flipped), "text": b"hello", "empty": b""}
    for name, data in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    before = talk.cache, list(talk.tokens), list(talk.messages)
    for name in (*files, "foreign", "missing"):
        with pytest.raises(ValueError, match=r"^\[load\] .*; try ") as error:
            saved.load(talk, str(tmp_path / name))
        assert "\n" not in str(error.value)
    assert (talk.cache, talk.tokens, talk.messages) == before
    assert_consistent(talk)


def test_a_cache_without_a_conversation(loaded, tmp_path):
    talk = talk_with(loaded)
    say(talk, "One")
    session.save_cache(tmp_path / "cache.safetensors", talk.cache)
    with pytest.raises(ValueError, match=r"^\[load\] a saved cache without a conversation; got .*; try"):
        saved.load(talk, str(tmp_path / "cache.safetensors"))
    place = saved.save(talk, str(tmp_path / "talk"))
    assert session.load_cache(place, talk.model)[0].tokens_seen == talk.seen


@pytest.mark.parametrize("policy", ["window", "full"])
def test_saved_with_another_model(loaded, tmp_path, policy):
    talk = talk_with(loaded, policy)
    say(talk, "One")
    place = saved.save(talk, str(tmp_path / "talk"))
    other = talk_with(mlx_lm.load(str(tiny_llama(tmp_path / "other", seed=7)))[:2])
    with pytest.raises(ValueError, match="another model"):
        saved.load(other, str(place))


def test_nowhere_and_nothing_to_save(loaded, tmp_path):
    talk = talk_with(loaded)
    with pytest.raises(ValueError, match="nothing to save"):
        saved.save(talk, str(tmp_path / "talk"))
    say(talk, "One")
    with pytest.raises(ValueError, match="no such folder"):
        saved.save(talk, str(tmp_path / "nowhere" / "talk"))
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match="cannot write"):
        saved.save(talk, str(tmp_path / "folder"))
    assert [p.name for p in tmp_path.iterdir()] == ["folder.safetensors"]


@pytest.mark.parametrize("how", ["change", "rewind"])
def test_a_replay_cut_within_a_forward_pass_leaves_no_half_read_layers(loaded, monkeypatch, how):
    """The first layer has read a chunk, the second has not: what is there is thrown away, and read again."""
    talk = talk_with(loaded, budget=140)
    for text in ("The sea was calm. " * 12, "And then? " * 8):
        say(talk, text)
    layer = type(talk.model.model.layers[1])
    original, calls = layer.__call__, iter(range(1 << 30))

    def cut(self, *arguments, **more):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(self, *arguments, **more)

    monkeypatch.setattr(layer, "__call__", cut)
    with pytest.raises(KeyboardInterrupt):
        talk.change(settings_from(policy="tova", budget=200)) if how == "change" else talk.rewind()
    monkeypatch.undo()
    assert talk.seen == 0
    say(talk, "Go on.")
    assert_consistent(talk)


def test_finished_turns_are_finished_after_a_replay_that_was_stopped(loaded):
    """``end_turn`` marks each, not all of them as one."""
    talk, other = talk_with(loaded), talk_with(loaded)
    for one in (talk, other):
        for text in ("One. " * 20, "Two. " * 20, "Three. " * 20):
            say(one, text)
    stop = Stop()
    stop.presses = 1
    talk.change(settings_from(policy="window", budget=4096), stop)
    assert talk.seen < len(talk.tokens)
    for one in (talk, other):
        say(one, "Four?")
    assert [c.turns for c in talk.cache] == [c.turns for c in other.cache]
    assert_consistent(talk)


def test_a_policy_that_has_no_room_for_the_history_is_refused(tmp_path_factory):
    model = mlx_lm.load(str(tiny_llama(tmp_path_factory.mktemp("m") / "short", context=300)))[:2]
    talk = talk_with(model, budget=150, max_tokens=60, positions="auto")
    for _ in range(3):
        say(talk, "The sea was calm that night. " * 2)
    before = talk.cache, talk.settings, talk.seen
    assert len(talk.tokens) > 300
    for policy, budget in (("full", None), ("window", None)):
        with pytest.raises(ValueError, match=r"\[policy\] the history is longer .* the limit is 300; try"):
            talk.change(endless(talk.model, settings_from(policy=policy, budget=budget, positions="auto")))
        assert (talk.cache, talk.settings, talk.seen) == before
    say(talk, "Go on.")
    talk.change(endless(talk.model, settings_from(policy="window", budget=1000, positions="auto")))
    say(talk, "Go on.")
    assert all(c.slots == 300 for c in pruned(talk.cache)), "no more than the model has positions"


def test_what_a_stopped_answer_took_back_can_be_saved(loaded, tmp_path):
    talk = talk_with(loaded)
    say(talk, "One.")
    kept = list(talk.tokens)
    talk._renew()
    saved.save(talk, str(tmp_path / "talk"))
    other = talk_with(loaded)
    saved.load(other, str(tmp_path / "talk"))
    assert (other.tokens, other.seen) == (kept, len(kept))
    assert_consistent(other)
