"""Is a base image fit? Python and torch, without importing torch: it takes seconds, and a build has no GPU.

`--folder` prints the folder torch is in: the image's own environment puts it on its path.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution

if sys.version_info < (3, 11):  # noqa: UP036 - it is the base image that may be older
    sys.exit(f"error: BASE_IMAGE has Python {sys.version.split()[0]}, and 3.11 or newer is needed")
try:
    torch = distribution("torch")
except PackageNotFoundError:
    sys.exit("error: BASE_IMAGE has no torch that its python3 finds; give a PyTorch image")
if torch.version.partition(".")[0] != "2":
    sys.exit(f"error: BASE_IMAGE has torch {torch.version}, and torch 2 is needed")

print(torch.locate_file("") if "--folder" in sys.argv else f"Python {sys.version.split()[0]}, torch {torch.version}")
