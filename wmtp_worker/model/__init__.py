"""The multi-token prediction policy: building, loading, saving. Nothing here talks to a bucket."""

import sys
from typing import Any

# transformers imports accelerate, which comes with peft, and that imports boto3 to ask about SageMaker: half a second
# of every start. What stands as None among the modules is not found. Nobody else imports boto3 itself.
if "boto3" not in sys.modules:
    modules: dict[str, Any] = sys.modules
    modules["boto3"] = None
    try:
        import accelerate as _accelerate  # type: ignore[import-untyped]  # noqa: F401
    finally:
        del modules["boto3"]
