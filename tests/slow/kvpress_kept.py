"""What kvpress keeps of a text, for tests/slow/test_kvpress.py: run in an environment that has kvpress and torch.

    python kvpress_kept.py MODEL_DIRECTORY TOKENS.json OUT.npz

``OUT.npz`` has for each press a bool array ``(layers, KV heads, tokens)``: True where it keeps a token.
"""

import json
import sys
from pathlib import Path

import kvpress
import numpy as np
import torch
from transformers import AutoModelForCausalLM

RATIO = 0.75  # of the tokens that go
PRESSES = {
    "window": kvpress.StreamingLLMPress,
    "knorm": kvpress.KnormPress,
    "keydiff": kvpress.KeyDiffPress,
    "tova": kvpress.TOVAPress,
    "snapkv": kvpress.SnapKVPress,
    "expected_attention": kvpress.ExpectedAttentionPress,
}


def kept(model, press, tokens):
    layers = {}
    score = press.score

    def recorded(module, hidden_states, keys, *args):
        scores = score(module, hidden_states, keys, *args)
        n_kept = int(keys.shape[2] * (1 - RATIO))
        mask = torch.zeros_like(scores, dtype=torch.bool)
        layers[module.layer_idx] = mask.scatter(-1, scores.topk(n_kept, dim=-1).indices, True)[0]
        return scores

    press.score = recorded
    with torch.no_grad(), press(model):
        model.model(torch.tensor([tokens]))
    return torch.stack([layers[i] for i in sorted(layers)]).numpy()


def main():
    directory, tokens, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()
    ids = json.loads(Path(tokens).read_text())
    np.savez(out, **{name: kept(model, press(compression_ratio=RATIO), ids) for name, press in PRESSES.items()})


if __name__ == "__main__":
    main()
