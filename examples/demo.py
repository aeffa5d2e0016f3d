"""A question about a document far longer than the model was trained for: ``make demo``."""

import subprocess
import sys
from pathlib import Path

DOCUMENT = Path(__file__).parent / "documents" / "aesop-fables.txt"
QUESTION = "How many oxen did the sick man vow to sacrifice to the gods?"
CACHE = ["--budget", "24.05MB", "--positions", "auto"]  # 512 slots per KV head for probe, 515 for window

if __name__ == "__main__":
    print("document: examples/documents/aesop-fables.txt (124 fables, 20,195 tokens; the model was trained on 8,192)")
    print(f"question: {QUESTION}\n", flush=True)
    command = [sys.executable, "-m", "mlx_kvprune", "ask", str(DOCUMENT), "-q", QUESTION, *CACHE]
    sys.exit(subprocess.call([*command, "--max-tokens", "40", "--compare", "window", *sys.argv[1:]]))
