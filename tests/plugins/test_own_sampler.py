"""A user's sampler works from Python and from a shell."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shell import shell

from selfflow import register_sampler, use
from selfflow.method.sampling import sample

FILE = Path(__file__).with_name("own_sampler.py")


def slope(x, t):
    return x + t


def test_its_step_is_two_euler_steps():
    use(FILE)
    x1 = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        sample(slope, x1, 4, "two_halves"), sample(slope, x1, 8, "euler")
    )


def test_a_step_that_changes_the_shape_is_refused():
    register_sampler("growing", lambda velocity, x, t, t_next: x[None])
    with pytest.raises(ValueError, match=r"'growing' made \(1, 2, 3\) of \(2, 3\)"):
        sample(slope, torch.zeros(2, 3), 2, "growing")


def test_a_shell_samples_with_it_and_with_options(runs, tmp_path):
    run = runs["tiny"]
    path = shutil.copytree(run.path, tmp_path / "run")
    own = ["sample", path, "--each", "1", "--steps", "2", "--method", "two_halves"]
    sde = ["sample", path, "--labels", "1", "--each", "1", "--steps", "3"]
    sde += ["--method", "sde"]
    sampled, help_text, unknown, late, refused = shell(
        tmp_path,
        [*own, "--use", FILE],
        ["sample", "--help", "--use", FILE],
        own,
        [*sde, "--last", "0.3"],
        [*sde, "--rtol", "0.3"],
    )
    assert sampled.status == 0, sampled.errors
    assert "dopri5, two_halves" in " ".join(help_text.output.replace("│", " ").split())
    assert "unknown sampler 'two_halves'" in unknown.refusal
    assert late.status == 0, late.errors
    (file,) = (path / "samples").glob("*-sde-last-0.3-3-*.safetensors")
    expected = run.sample(torch.tensor([1]), 3, "sde", last=0.3)["image"]
    assert torch.equal(load_file(file)["images"], expected)
    assert "unknown option --rtol" in refused.errors
    assert refused.status == 2


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("eular", {}, "unknown sampler 'eular'.*Did you mean 'euler'"),
        ("euler", {"rtol": 0.1}, "sampler euler has no options, but rtol is given"),
        (
            "dopri5",
            {"rtoll": 0.1},
            "unknown option of sampler dopri5.*Did you mean 'rtol'",
        ),
    ],
)
def test_unknown_names_and_options_are_refused(method, options, words):
    with pytest.raises(ValueError, match=words):
        sample(slope, torch.zeros(2), method=method, **options)


def test_options_reach_a_sampler_from_python(runs):
    run = runs["tiny"]
    label = torch.tensor([1])
    usual = run.sample(label, 3, "sde")["image"]
    late = run.sample(label, 3, "sde", last=0.3)["image"]
    assert torch.equal(run.sample(label, 3, "sde", last=0.04)["image"], usual)
    assert not torch.isclose(late, usual).all()
