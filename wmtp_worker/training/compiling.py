"""`training.compile`: decoder layers as compiled code (torch.compile), each by itself; all else stays as it is.

Layers of one shape share their code. Only training steps run it, which have one shape: what was compiled then does not
depend on which validations a process has seen, and a resumed run takes the steps of one that was never stopped. The
embedding and the loss stay eager: the gradient of a compiled embedding is not reproducible.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from wmtp_worker.errors import SettingsError
from wmtp_worker.model.mtp import layers_of
from wmtp_worker.settings import Settings
from wmtp_worker.storage.layout import compiled_dir


def compile_layers(settings: Settings, model: torch.nn.Module) -> None:
    """Where the settings want it, let each decoder layer compile itself when it first runs; before it is sharded.

    The code is kept in the work directory, or where `TORCHINDUCTOR_CACHE_DIR` says. Raises `SettingsError` where there
    is no compiler.
    """
    if settings.training.compile == "none":
        return
    # what inductor takes on a CPU, and what Triton needs for its launchers
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise SettingsError(
            f"training.compile=layers needs a C++ compiler, and there is no {compiler}",
            where=settings.sources["training.compile"],
            fix="install it (apt-get install g++), name another one in CXX, or set training.compile=none",
        )
    import torch._inductor.config as inductor  # takes seconds

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_dir(settings.run.workdir).resolve()))
    inductor.deterministic = True  # no choice by a stopwatch, which would choose otherwise in another process
    for layer in layers_of(model):
        layer.compile(dynamic=False)


@contextmanager
def eager(settings: Settings) -> Iterator[None]:
    """Inside, nothing is compiled, and nothing that is compiled is run."""
    if settings.training.compile == "none":
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield
