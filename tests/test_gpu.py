"""The same paths on a GPU, where there is one: device mistakes do not show on a CPU."""
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY, VANILLA

from selfflow.images import digits
from selfflow.probing import probe_run
from selfflow.run import Run
from selfflow.training import train, validation_losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [TINY, VANILLA], ids=lambda c: c.name)
def test_training_agrees_with_the_cpu(tmp_path, config, precision):
    config = replace(config, training=replace(config.training, precision=precision))
    gpu, cpu = train(config, tmp_path / "gpu", "cuda"), train(config, tmp_path / "cpu", "cpu")
    tolerance = 1e-3 if precision == "fp32" else 3e-2
    assert gpu.log["flow_loss"].tolist() == pytest.approx(cpu.log["flow_loss"].tolist(), rel=tolerance)
    shutil.rmtree(gpu.path / "checkpoints/step-00000012")
    again = train(config, tmp_path / "gpu", "cuda")
    assert again.log["flow_loss"].tolist() == pytest.approx(gpu.log["flow_loss"].tolist(), rel=tolerance)


def test_looking_inside_agrees_with_the_cpu(tmp_path):
    train(TINY, tmp_path, "cuda")
    gpu, cpu = (Run.open(tmp_path / TINY.name, device) for device in ("cuda", "cpu"))
    labels = digits("test").labels[:20]
    close = {"atol": 1e-3, "rtol": 0}
    torch.testing.assert_close(*(run.sample(labels, steps=4, cfg_scale=2.0) for run in (gpu, cpu)), **close)
    torch.testing.assert_close(*(validation_losses(run.teacher, TINY) for run in (gpu, cpu)), **close)
    few = {"levels": (0.25,), "layers": (2,), "strengths": (0.1,)}
    assert probe_run(gpu, **few).results[0].accuracy == pytest.approx(probe_run(cpu, **few).results[0].accuracy, abs=0.02)
