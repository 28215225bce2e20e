"""``python -m matryoshka_lora`` is the command ``matryoshka``."""

from __future__ import annotations

from matryoshka_lora.cli.main import main

if __name__ == "__main__":
    main()
