"""What only a GPU can show: it trains, and resumes to the same bits with deterministic kernels."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_run_resumes_exactly(precision, moments, tiny_run, run_record, tmp_path):
    settings = ("host.device=cuda", f"training.precision={precision}", f"training.moments={moments}")
    settings = (*settings, "evaluation.every=0")
    tiny_run(tmp_path, *settings)
    straight = run_record(tmp_path)["files"]
    assert tiny_run(tmp_path, *settings, resume=9).resumed_from == 9
    assert run_record(tmp_path)["files"] == straight
