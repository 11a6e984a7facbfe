"""Training, sampling and resuming also work on a GPU."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import TINY, VANILLA

from selfflow.analysis.benchmark import Case, measure
from selfflow.analysis.probing import probe_run
from selfflow.data.datasets import digits
from selfflow.draws import keyed, noise_like
from selfflow.method.options import ObjectiveConfig
from selfflow.training.batches import validation_losses
from selfflow.training.loop import train
from selfflow.training.run import Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [TINY, VANILLA], ids=lambda c: c.name)
def test_training_agrees_with_the_cpu(tmp_path, config, precision):
    config = replace(config, training=replace(config.training, precision=precision))
    gpu = train(config, tmp_path / "gpu", "cuda")
    cpu = train(config, tmp_path / "cpu", "cpu")
    tolerance = 1e-3 if precision == "fp32" else 3e-2
    assert gpu.log["flow_loss"].tolist() == pytest.approx(
        cpu.log["flow_loss"].tolist(), rel=tolerance
    )
    shutil.rmtree(gpu.path / "checkpoints/step-00000012")
    again = train(config, tmp_path / "gpu", "cuda")
    assert again.log["flow_loss"].tolist() == pytest.approx(
        gpu.log["flow_loss"].tolist(), rel=tolerance
    )


def test_noise_is_that_of_the_cpu():
    draws = [partial(keyed, 0, shard=shard) for shard in range(8)]
    x = torch.zeros(64, 100, 3)
    # the pinned memory of one is another's
    drawn = [noise_like(x.cuda(), draws).cpu() for _ in range(3)]
    assert all(torch.equal(noise, noise_like(x, draws)) for noise in drawn)


def test_looking_inside_agrees_with_the_cpu(tmp_path):
    train(TINY, tmp_path, "cuda")
    gpu, cpu = (Run.open(tmp_path / TINY.name, device) for device in ("cuda", "cpu"))
    labels = digits("test").labels[:20]
    close = {"atol": 1e-3, "rtol": 0}
    torch.testing.assert_close(
        *(run.sample(labels, steps=4, cfg_scale=2.0)["image"] for run in (gpu, cpu)),
        **close,
    )
    torch.testing.assert_close(
        *(validation_losses(run.teacher, TINY) for run in (gpu, cpu)), **close
    )
    few = {"levels": (0.25,), "layers": (2,), "strengths": (0.1,)}
    first, second = (
        probe_run(run, families=("regression",), **few).grid("class")[0, 0]
        for run in (gpu, cpu)
    )
    assert first == pytest.approx(second, abs=0.02)


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig("sra"),
        ObjectiveConfig("layer_sync", normalise="centred"),
        ObjectiveConfig(separated=True, single_share=0.25),
        ObjectiveConfig(schedule="diffusion_forcing"),
        ObjectiveConfig(levels=4, density="plateau_logit_normal", noisy_share=0.05),
        ObjectiveConfig(
            exact=True, block=2, near=0.2, rep_tokens="noisier", distance="smooth_l1"
        ),
    ],
)
def test_every_variant_agrees_with_the_cpu(tmp_path, objective):
    config = replace(TINY, objective=objective)
    losses = [
        train(config, tmp_path / device, device).log["total"].tolist()
        for device in ("cuda", "cpu")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_compiled_blocks_agree(tmp_path):
    compiled = replace(
        TINY, name="compiled", training=replace(TINY.training, compile=True)
    )
    losses = [
        train(config, tmp_path, "cuda").log["flow_loss"].tolist()
        for config in (TINY, compiled)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_benchmark_runs(precision):
    measured = measure(
        Case("tiny", tokens=16, batch=4, precision=precision), rounds=2, device="cuda"
    )["results"]
    assert all(
        values["peak_bytes"] > 0 and values["seconds"][1] > 0
        for values in measured.values()
    )
    assert measured["Self-Flow"]["flops"] < 0.7 * measured["published form"]["flops"]
