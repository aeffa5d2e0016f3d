"""``python -m mlx_kvprune``: the same as the console script ``mlx-kvprune``."""

from mlx_kvprune.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
