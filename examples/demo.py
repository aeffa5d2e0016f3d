"""A question about a document eight times as long as the cache: ``make demo``."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
QUESTION = "How many oxen did the sick man vow to sacrifice to the gods?"

if __name__ == "__main__":
    print(f"document: examples/documents/aesop-fables.txt (3,489 tokens)\nquestion: {QUESTION}\n", flush=True)
    command = [sys.executable, "-m", "mlx_kvprune", "ask", str(HERE / "documents" / "aesop-fables.txt"), "-q", QUESTION]
    sys.exit(subprocess.call([*command, "--budget", "432", "--max-tokens", "40", "--compare", "window", *sys.argv[1:]]))
