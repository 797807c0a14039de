"""Settings of every test: one thread per process, software rendering, shapes and types checked in triune.vla."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("triune.vla", "beartype.beartype")
