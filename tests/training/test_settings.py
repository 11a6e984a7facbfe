"""Settings of torch do not change a run, and a run does not change them."""

from contextlib import contextmanager

import pytest
import torch

from selfflow.analysis.features import extract
from selfflow.data.datasets import digits
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.method.options import ModelConfig, ObjectiveConfig
from selfflow.settings import own_settings
from selfflow.training.batches import Validation
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train
from selfflow.training.run import Run


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad off": lambda: torch.set_grad_enabled(False),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "meta context": lambda: torch.device("meta"),
}


def settings():
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_autocast_dtype("cpu"),
    )


def config_of(precision):
    training = TrainConfig(
        steps=8,
        batch=8,
        precision=precision,
        log_every=1,
        validate_every=4,
        save_every=8,
        sample_every=8,
        validation=8,
    )
    data = DataConfig("notes", patch=8) if precision == "fp32" else DataConfig()
    return Config(
        name=precision,
        data=data,
        model=ModelConfig(width=16, depth=4, heads=2),
        objective=ObjectiveConfig(),
        training=training,
    )


def all_of(folder, precision):
    "Losses, samples and features of a run."
    run = train(config_of(precision), folder, "cpu", bar=False)
    opened = Run.open(run.path, "cpu")
    drawn = opened.sample([0, 1], steps=3)
    results = [
        run.log_path.read_text(),
        opened.sample_history()[-1][1],
        *(drawn.values() if isinstance(drawn, dict) else [drawn]),
    ]
    assert not any(p.is_inference() for p in opened.model.parameters())
    if precision == "bf16":
        digits, x1 = Validation.of(opened.config).data["digits"]
        results.append(extract(opened.teacher, digits.x0, x1, 0.5, (2,))[2])
    return results


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def plain(request, tmp_path_factory):
    return request.param, all_of(tmp_path_factory.mktemp("plain"), request.param)


@pytest.mark.parametrize("name", AMBIENT)
def test_a_run_is_identical_whatever_the_caller_has_set(plain, tmp_path, name):
    precision, expected = plain
    with AMBIENT[name]():
        before = settings()
        results = all_of(tmp_path, precision)
        assert settings() == before
    assert results[0] == expected[0]
    for values, others in zip(results[1:], expected[1:], strict=True):
        assert torch.equal(values, others), (values.dtype, others.dtype)


@pytest.mark.parametrize("name", AMBIENT)
def test_cached_data_do_not_depend_on_the_callers_settings(name):
    digits.__globals__["_digits"].cache_clear()
    try:
        with AMBIENT[name]():
            inside = digits().images
            made = (
                Sources(DataConfig("motion", size=16, frames=8, patch=8))
                .take("motion", torch.tensor([0, 1], device="cpu"))
                .x0
            )
    finally:
        digits.__globals__["_digits"].cache_clear()
    for values in (inside, made):
        assert values.dtype == torch.float32
        assert values.device.type == "cpu"
        assert not values.is_inference()


def test_settings_hold_again_after_an_error():
    with AMBIENT["float64"](), AMBIENT["autocast"](), torch.inference_mode():
        before = settings()
        with pytest.raises(KeyError), own_settings():
            assert settings() == (
                torch.float32,
                torch.device("cpu"),
                True,
                False,
                False,
                False,
                before[-1],
            )
            raise KeyError
        assert settings() == before
