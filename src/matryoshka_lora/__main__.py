"""`python -m matryoshka_lora` is `matryoshka`."""

from matryoshka_lora.cli import main

if __name__ == "__main__":
    main()
