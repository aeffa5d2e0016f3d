"""Gate files to the hub and back, on a hub of our own: nothing goes over the network."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from tiny_models import tiny_model

from mlx_kvprune.gates import Gates, GateShape, files, hub

CARD = files.Card(
    "retention",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    stage="distill",
    data=("fables (public domain)", "a|b"),
    tokens=1234567,
    minutes="90 on two cores",
    budget="1/16 to 1/3",
    thresholds={"1/4": 0.5, "1/8": 0.25},
    quality=({"budget": "1/8", "kl": 0.123456}, {"budget": "1/4", "window": 0.5}),
    limits="English only.",
    licence="MIT",
    settings={"local_layers": "0,3", "rate": 0.002},
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def gate_file(model, tmp_path):
    return files.save(tmp_path / "mine", Gates(GateShape("linear", (128, 128), (2, 2))), model, CARD)


class Hub:
    """Repositories are folders."""

    def __init__(self, root: Path):
        self.root, self.private = root, {}

    def create_repo(self, repo, private=False, exist_ok=False):
        assert exist_ok
        self.private.setdefault(repo, private)
        (self.root / repo).mkdir(parents=True, exist_ok=True)
        return f"https://hub/{repo}"

    def list_repo_files(self, repo):
        return [p.name for p in (self.root / repo).iterdir()]

    def hf_hub_download(self, repo, name):
        return str(self.root / repo / name)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id):
        to = self.root / repo_id / path_in_repo
        if isinstance(path_or_fileobj, bytes):
            to.write_bytes(path_or_fileobj)
        else:
            shutil.copy(path_or_fileobj, to)


@pytest.fixture
def our_hub(tmp_path, monkeypatch):
    there = Hub(tmp_path / "hub")

    def snapshot_download(repo, allow_patterns):
        assert allow_patterns == ["gates*.safetensors", "README.md"]
        if not (there.root / repo).is_dir():
            raise OSError(f"404 for {repo}.\nand more lines")
        return str(there.root / repo)

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: there)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return there


def test_there_and_back(our_hub, gate_file, model):
    assert hub.push(gate_file, "me/gates", private=True) == "https://hub/me/gates"
    assert our_hub.private == {"me/gates": True}
    assert sorted(our_hub.list_repo_files("me/gates")) == ["README.md", "gates-mine.safetensors"]
    assert files.located("me/gates", "retention") == our_hub.root / "me/gates/gates-mine.safetensors"
    gates = files.load_for(model, "retention", "me/gates")
    assert gates.local == "0,3"
    assert mx.array_equal(gates.layers[0].bias, mx.full((2,), 6.0))
    with pytest.raises(ValueError, match=r"\[gates\] nothing for policy 'kvzap' in me/gates; got retention"):
        files.located("me/gates", "kvzap")


def test_the_readme_says_what_the_card_says(our_hub, gate_file):
    hub.push(gate_file, "me/gates")
    text = (our_hub.root / "me/gates/README.md").read_text()
    front = text.split("---\n")[1].splitlines()
    assert 'license: "mit"' in front
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M-Instruct"' in front
    assert "- mlx-kvprune" in front
    for line in (
        "## gates-mine.safetensors",
        "| method | retention |",
        r"| data | fables (public domain); a\|b |",
        "| tokens | 1,234,567 |",
        "| minutes | 90 on two cores |",
        "| settings | local_layers=0,3, rate=0.002 |",
        "| 1/8 | 0.25 |",
        "| budget | kl | window |",
        "| 1/8 | 0.1235 |  |",
        "Limits: English only.",
        "mlx-kvprune generate --policy retention --gates me/gates --budget 512 --prompt ...",
    ):
        assert line in text.splitlines(), line


def test_a_file_that_is_no_gate_file_is_let_be(our_hub, gate_file):
    (our_hub.root / "me/gates").mkdir(parents=True)
    (our_hub.root / "me/gates/gates-old.safetensors").write_text("something else")
    hub.push(gate_file, "me/gates")
    assert "gates-old" not in (our_hub.root / "me/gates/README.md").read_text()


def test_a_second_file_joins_the_readme(our_hub, gate_file, model, tmp_path):
    hub.push(gate_file, "me/gates")
    other = files.save(
        tmp_path / "gates-b",
        Gates(GateShape("linear", (128, 128), (2, 2))),
        model,
        replace(CARD, method="kvzap", model=""),
    )
    hub.push(other, "me/gates", model="org/model")
    text = (our_hub.root / "me/gates/README.md").read_text()
    assert text.count("## gates-") == 2
    assert 'base_model: "org/model"' in text
    assert files.located("me/gates", "kvzap").name == "gates-b.safetensors"


def test_a_readme_of_somebodys_own_stays(our_hub, gate_file):
    our_hub.create_repo("me/model", exist_ok=True)
    (our_hub.root / "me/model/README.md").write_text("mine")
    (our_hub.root / "me/model/model.safetensors").write_text("not gates")
    hub.push(gate_file, "me/model")
    assert (our_hub.root / "me/model/README.md").read_text() == "mine"
    assert files.located("me/model", "retention").name == "gates-mine.safetensors"


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (ConnectionError("[Errno -2] Name or service not known"), "no network"),
        (OfflineModeIsEnabled("offline"), "nothing of it on this disk, and HF_HUB_OFFLINE is set"),
        (RuntimeError("503 Server Error: busy\nRequest ID: 9"), "503 Server Error: busy"),
        (RuntimeError("Client error '403 Forbidden'"), "Client error '403 Forbidden'"),
    ],
)
def test_reasons_that_people_can_act_on(monkeypatch, cause, reason):
    """The client says "not found on this disk" of whatever it met."""

    def failing(*_, **__):
        raise LocalEntryNotFoundError("An error happened while trying to locate the files\nand more") from cause

    monkeypatch.setattr("huggingface_hub.snapshot_download", failing)
    with pytest.raises(ValueError, match=f"cannot fetch me/gates; got {reason}; try a network, the repo"):
        hub.pull("me/gates")


def test_errors_are_one_line(our_hub, gate_file, monkeypatch):
    with pytest.raises(ValueError, match=r"^\[gates\] cannot fetch me/none; got 404 for me/none; try a network.*$"):
        hub.pull("me/none")
    for name in ("none", "a/b/c", "/b", "./b", "a/b.safetensors"):
        with pytest.raises(ValueError, match=r"\[gates\] not a repository on the hub; got .*; try OWNER/NAME"):
            hub.pull(name)
    with pytest.raises(ValueError, match=r"\[gates\] cannot read .*none"):
        hub.push("none.safetensors", "me/gates")

    def refused(*_, **__):
        raise RuntimeError("401 Unauthorized")

    monkeypatch.setattr(our_hub, "create_repo", refused)
    with pytest.raises(
        ValueError, match=r"\[gates\] cannot push to me/gates; got 401 Unauthorized; try `hf auth login`"
    ):
        hub.push(gate_file, "me/gates")
