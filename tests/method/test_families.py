"""Inputs prepared for published families equal those of the pipelines of diffusers."""

import inspect
import math

import pytest
import torch

from selfflow.method.families import RECIPES, published_shift, recipe_table
from selfflow.method.tokens import ImagePatches, Part, VideoPatches

diffusers = pytest.importorskip("diffusers")

from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # noqa: E402
from diffusers.pipelines.flux2.pipeline_flux2 import (  # noqa: E402
    compute_empirical_mu,
)

from selfflow.data.autoencoder import _SIGNALS  # noqa: E402
from selfflow.method.diffusers_backbone import FAMILIES  # noqa: E402

PIPELINES = {
    "flux2": "Flux2Pipeline",
    "wan": "WanPipeline",
    "ltx": "LTXPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "dit": "DiTPipeline",
    "pixart": "PixArtAlphaPipeline",
}


def names_in(pipeline):
    arguments = inspect.signature(pipeline.__init__).parameters
    return {
        name: getattr(argument.annotation, "__name__", str(argument.annotation))
        for name, argument in arguments.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_module_names_equal_those_of_the_pipeline(name):
    recipe = RECIPES[name]
    family = FAMILIES[name]
    modules = names_in(getattr(diffusers, PIPELINES[name]))
    assert modules["vae"] == recipe.autoencoder
    assert recipe.autoencoder in _SIGNALS
    assert (_SIGNALS[recipe.autoencoder] == "video") == family.video
    # the annotation may be a union with None
    assert family.model_class in modules["transformer"]
    encoders = [kind for key, kind in modules.items() if key.startswith("text_encoder")]
    own = [*recipe.pooled, recipe.encoder] if recipe.encoder else []
    assert encoders == own
    assert bool(recipe.pooled) == family.pools_text
    model = getattr(diffusers, family.model_class)
    takes = "guidance" in inspect.signature(model.forward).parameters
    assert takes == recipe.guidance


@pytest.mark.parametrize("tokens", [64, 1024, 4000, 4096, 5000])
@pytest.mark.parametrize("steps", [10, 50])
def test_shifts_equal_those_of_the_pipelines(tokens, steps):
    expected = {
        "flux2": compute_empirical_mu(tokens, steps),
        "flux": calculate_shift(tokens),
        "ltx": calculate_shift(tokens, 1024, 4096, 0.95, 2.05),
        "sd3": math.log(3),
        "wan": math.log(3),
        "dit": 0,
        "pixart": 0,
    }
    assert expected.keys() == RECIPES.keys()
    for family, mu in expected.items():
        assert math.log(published_shift(family, tokens, steps)) == pytest.approx(mu)
    with pytest.raises(ValueError, match="flux2"):
        published_shift("fluxx", tokens)


def test_a_shift_moves_levels_as_the_scheduler_does():
    from selfflow.method.flow import shift

    t = torch.linspace(0.05, 1, 20)
    alpha = published_shift("flux", 4096)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    moved = scheduler.time_shift(calculate_shift(4096), 1.0, t)
    torch.testing.assert_close(shift(t, alpha), moved)


def test_tokens_are_packed_as_in_the_pipelines():
    latents = torch.randn(2, 4, 6, 8)
    own = ImagePatches(4, 6, 8, RECIPES["flux"].patch[1]).patchify(latents)
    packed = diffusers.FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(own, packed)
    # Flux2: patches of the autoencoder's latents, then one latent in a token
    patches = diffusers.Flux2Pipeline._patchify_latents(latents)
    own_patches = ImagePatches(16, 3, 4, RECIPES["flux2"].patch[1]).patchify(patches)
    assert torch.equal(own_patches, diffusers.Flux2Pipeline._pack_latents(patches))
    assert torch.equal(own_patches, own)
    videos = torch.randn(2, 4, 3, 6, 8)
    span, patch, _ = RECIPES["ltx"].patch
    own_videos = VideoPatches(4, 3, 6, 8, patch, span).patchify(videos)
    assert torch.equal(own_videos, diffusers.LTXPipeline._pack_latents(videos))


def test_coordinates_equal_those_of_the_pipelines():
    part = Part("image", 4, (1, 3, 5))
    places = part.coordinates()
    ids = diffusers.Flux2Pipeline._prepare_latent_ids(torch.zeros(1, 4, 3, 5))
    assert torch.equal(places, ids[0].float())
    image_ids = diffusers.FluxPipeline._prepare_latent_image_ids(
        1, 3, 5, "cpu", torch.float32
    )
    assert torch.equal(places[:, :3], image_ids)
    assert FAMILIES["ltx"].place_scale == (8 / 25, 32, 32)


@pytest.mark.parametrize("name", ["wan", "sd3", "dit", "pixart"])
def test_patches_equal_those_that_the_model_cuts(name):
    kind = getattr(diffusers, FAMILIES[name].model_class)
    defaults = inspect.signature(kind.__init__).parameters
    size = defaults["patch_size"].default
    assert RECIPES[name].patch == (size if name == "wan" else (1, size, size))


def test_the_table_has_a_row_for_each_family():
    assert list(recipe_table()["family"]) == list(FAMILIES)
