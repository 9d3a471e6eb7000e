"""Which cloud's machine this is, by what its firmware says. Nothing is asked over the network."""

from pathlib import Path
from typing import Literal

Cloud = Literal["ec2", "gcp", "azure"]

ROOT = Path("/")
# Hyper-V machines elsewhere have the same vendor, but not this tag
_AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"


def find_cloud(root: Path = ROOT) -> Cloud | None:
    """The cloud that made this machine, None for any other. Containers see their machine's firmware too."""
    if _dmi(root, "sys_vendor") == "Amazon EC2" or _text(root / "sys/hypervisor/uuid").startswith("ec2"):
        return "ec2"
    # a Chromebook has the same vendor
    if _dmi(root, "product_name") == "Google Compute Engine":
        return "gcp"
    if _dmi(root, "chassis_asset_tag") == _AZURE_TAG:
        return "azure"
    return None


def _dmi(root: Path, item: str) -> str:
    return _text(root / "sys/class/dmi/id" / item)


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
