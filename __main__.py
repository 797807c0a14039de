"""``python -m triune`` is ``vla``, for launchers that start modules: ``torchrun --nproc-per-node 8 -m triune train RECIPE``."""

from .cli.main import main

if __name__ == "__main__":
    main()
