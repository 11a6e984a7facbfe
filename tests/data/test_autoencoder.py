"""Autoencoders of diffusers in a local folder give the latents of diffusers itself.

Nothing is fetched, damaged folders are refused, and Haar is lossless.
"""

import json
import socket
import sys

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from selfflow.data.autoencoder import Haar, open_autoencoder
from selfflow.data.datasets import ImageSet, digits
from selfflow.data.latents import Latents, encode_latents

diffusers.utils.logging.set_verbosity_error()
WEIGHTS = "diffusion_pytorch_model.safetensors"


def kl(channels=1, **options):
    return diffusers.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 8],
        latent_channels=2,
        norm_num_groups=2,
        sample_size=8,
        **options,
    )


def wan(channels=3, **options):
    return diffusers.AutoencoderKLWan(
        **{
            "base_dim": 4,
            "z_dim": 2,
            "dim_mult": [1, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [True],
            "in_channels": channels,
            "out_channels": channels,
            "latents_mean": [0.5, -2.0],
            "latents_std": [1.5, 0.5],
        }
        | options
    )


def flux2():
    model = diffusers.AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 8],
        latent_channels=2,
        norm_num_groups=2,
        sample_size=8,
    )
    model.bn.running_mean.copy_(torch.linspace(-1, 1, 8))
    model.bn.running_var.copy_(torch.linspace(0.5, 2, 8))
    return model


def ltx(**options):
    model = diffusers.AutoencoderKLLTXVideo(
        **{
            "latent_channels": 3,
            "block_out_channels": (4, 4),
            "decoder_block_out_channels": (4, 4),
            "down_block_types": ("LTXVideoDownBlock3D",) * 2,
            "layers_per_block": (1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1),
            "spatio_temporal_scaling": (True, False),
            "decoder_spatio_temporal_scaling": (True, False),
            "decoder_inject_noise": (False, False, False),
            "downsample_type": ("conv", "conv"),
            "upsample_residual": (False, False),
            "upsample_factor": (1, 1),
            "patch_size": 2,
            "scaling_factor": 0.5,
        }
        | options
    )
    model.latents_mean.copy_(torch.tensor([0.5, -1.0, 0.0]))
    model.latents_std.copy_(torch.tensor([2.0, 0.25, 1.0]))
    return model


def oobleck(channels):
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        audio_channels=channels,
        sampling_rate=8000,
    )


# model, signal, shape of the signal, shape of its latents, shift and scale by channel
KINDS = {
    "kl": (lambda: kl(), "image", (1, 8, 12), (2, 4, 6), 0.0, 0.18215),
    "kl shifted": (
        lambda: kl(3, shift_factor=0.0609, scaling_factor=1.5305),
        "image",
        (3, 8, 8),
        (2, 4, 4),
        0.0609,
        1.5305,
    ),
    "kl by channel": (
        lambda: kl(
            3, latents_mean=[0.5, -2.0], latents_std=[4.0, 0.25], scaling_factor=0.5
        ),
        "image",
        (3, 4, 8),
        (2, 2, 4),
        [0.5, -2.0],
        [0.125, 2.0],
    ),
    "wan": (
        lambda: wan(),
        "video",
        (3, 9, 8, 6),
        (2, 5, 4, 3),
        [0.5, -2.0],
        [1 / 1.5, 2.0],
    ),
    "wan, one frame": (
        lambda: wan(),
        "video",
        (3, 1, 4, 4),
        (2, 1, 2, 2),
        [0.5, -2.0],
        [1 / 1.5, 2.0],
    ),
    "wan, by four": (
        lambda: wan(dim_mult=[1, 2, 2], temperal_downsample=[True, True]),
        "video",
        (3, 9, 8, 8),
        (2, 3, 2, 2),
        [0.5, -2.0],
        [1 / 1.5, 2.0],
    ),
    "wan in patches": (
        lambda: wan(
            12,
            dim_mult=[1, 2, 2],
            temperal_downsample=[False, True],
            is_residual=True,
            patch_size=2,
        ),
        "video",
        (3, 5, 16, 8),
        (2, 3, 2, 1),
        [0.5, -2.0],
        [1 / 1.5, 2.0],
    ),
    "oobleck": (lambda: oobleck(1), "audio", (64,), (4, 8), 0.0, 1.0),
    "oobleck in stereo": (lambda: oobleck(2), "audio", (40,), (4, 5), 0.0, 1.0),
}


def save_model(model, folder, seed=0):
    """Save a model with random weights, none of them zero or one, in a folder."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        inputs = value[0].numel() if value.ndim > 1 else 1
        noise = torch.randn(value.shape, generator=generator)
        value.data.copy_(noise / max(inputs, 1) ** 0.5)
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_model(kl(3), tmp_path_factory.mktemp("vae"))


@pytest.fixture
def vae_copy(vae, tmp_path):
    "Folder, config and weights of a copy that a test may damage."
    (tmp_path / "copy").mkdir()
    for name in ("config.json", WEIGHTS):
        (tmp_path / "copy" / name).write_bytes((vae / name).read_bytes())
    return (
        tmp_path / "copy",
        json.loads((vae / "config.json").read_text()),
        load_file(vae / WEIGHTS),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_the_scaled_mean_of_diffusers(tmp_path, kind):
    make, signal, shape, latent_shape, shift, scale = KINDS[kind]
    model = make()
    opened = open_autoencoder(save_model(model, tmp_path))
    assert opened.signal == signal
    assert opened.latent_shape(shape) == latent_shape
    assert not opened.training
    assert not any(value.requires_grad for value in opened.parameters())
    signals = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = (
        signals
        if signal != "audio"
        else torch.stack([signals] * model.config.audio_channels, 1)
    )
    broadcast = [1, -1] + [1] * (len(latent_shape) - 1)
    shift, scale = (torch.tensor(value).reshape(broadcast) for value in (shift, scale))
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
        expected = (posterior.mean - shift) * scale
        decoded = model.decode(expected / scale + shift).sample
    z = opened.encode(signals)
    assert z.shape == (3, *latent_shape)
    assert z.dtype == torch.float32
    assert not z.requires_grad
    assert z.std() > 0.01
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(
        opened.decode(expected), decoded.mean(1) if signal == "audio" else decoded
    )
    assert opened.decode(z).shape == signals.shape
    assert torch.equal(z, opened.encode(signals)), "the mean, never a sample"
    torch.testing.assert_close(
        opened.encode(signals[1:2]), z[1:2], atol=1e-3, rtol=1e-3
    )


def test_a_grey_image_is_repeated_in_each_channel(vae):
    opened = open_autoencoder(vae)
    gray = digits().images[:2]
    assert opened.latent_shape((1, 8, 8)) == (2, 4, 4)
    assert torch.equal(opened.encode(gray), opened.encode(gray.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    "kind, shape, words",
    [
        (
            "kl",
            (1, 8, 9),
            r"image has shape \(1, 8, 9\).* 1 or 1 channels of 2 k x 2 k",
        ),
        ("kl shifted", (2, 8, 8), "1 or 3 channels"),
        ("kl", (8, 8), "2 k x 2 k"),
        ("kl", (1, 0, 8), "2 k"),
        ("kl", (1, 1, 8, 8), "2 k"),
        ("kl", (), "2 k"),
        ("wan", (3, 8, 8, 8), r"\(4 k \+ 1\) x 2 k x 2 k"),
        ("wan", (3, 3, 8, 8), r"\(4 k \+ 1\)"),
        ("wan", (3, 0, 8, 8), r"\(4 k"),
        ("wan", (3, 8, 8), r"\(4 k"),
        ("wan in patches", (3, 5, 8, 12), r"\(4 k \+ 1\) x 8 k x 8 k"),
        ("wan in patches", (12, 5, 8, 8), "1 or 3 channels"),
        ("oobleck", (60,), "of 8 k values"),
        ("oobleck", (1, 64), "of 8 k values"),
    ],
)
def test_signals_that_do_not_fit_are_refused(tmp_path, kind, shape, words):
    opened = open_autoencoder(save_model(KINDS[kind][0](), tmp_path))
    with pytest.raises(ValueError, match=words):
        opened.latent_shape(shape)
    with pytest.raises(ValueError, match=words):
        opened.encode(torch.zeros(1, *shape))


def test_a_fingerprint_depends_on_weights_and_config(vae, vae_copy):
    folder, config, weights = vae_copy
    first = open_autoencoder(vae).fingerprint
    assert len(first) == 16
    assert (
        open_autoencoder(folder).fingerprint
        == first
        == open_autoencoder(str(folder)).fingerprint
    )
    (folder / "config.json").write_text(
        json.dumps(config | {"_diffusers_version": "0.1", "_name_or_path": "elsewhere"})
    )
    assert open_autoencoder(folder).fingerprint == first, "its origin is no part of it"
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    scaled = open_autoencoder(folder).fingerprint
    (folder / "config.json").write_text(json.dumps(config))
    weights["encoder.conv_in.weight"][0, 0, 0, 0] += 1e-6
    save_file(weights, folder / WEIGHTS)
    assert len({first, scaled, open_autoencoder(folder).fingerprint}) == 3


def test_nothing_is_fetched_and_no_random_number_is_drawn(vae, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    opened = open_autoencoder(vae)
    opened.decode(opened.encode(torch.zeros(1, 3, 8, 8)))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    for name in (
        "stabilityai/sd-vae-ft-mse",
        "https://example.org/vae",
        vae / "deeper",
        vae / "config.json",
        "",
    ):
        with pytest.raises(
            ValueError,
            match="not a local folder with a config.json, and nothing is fetched",
        ):
            open_autoencoder(name)


@pytest.mark.parametrize(
    "config, words",
    [
        ("", "config.json cannot be used"),
        ("[]", "cannot be used"),
        ("{}", "unknown autoencoder None"),
        ("[" * 100000, "cannot be used"),
        (
            '{"_class_name": "AutoencoderKLMagi"}',
            "unknown autoencoder 'AutoencoderKLMagi'; known are .*Did you mean "
            "'AutoencoderKL'",
        ),
        ('{"_class_name": ["AutoencoderKL"]}', "cannot be used"),
        ('{"_class_name": "UNet2DModel"}', "unknown autoencoder"),
        ("\xff\xfe", "cannot be used"),
    ],
)
def test_unsuitable_configs_are_refused(vae_copy, config, words):
    (vae_copy[0] / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(ValueError, match=words):
        open_autoencoder(vae_copy[0])


def test_pickled_weights_are_refused_without_being_read(vae_copy):
    folder, _, _ = vae_copy
    (folder / WEIGHTS).unlink()
    with pytest.raises(
        ValueError,
        match=f"does not have its weights in one file {WEIGHTS}; save it by "
        f"save_pretrained",
    ):
        open_autoencoder(folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch harmed'\ntR."
    )
    with pytest.raises(
        ValueError, match="diffusion_pytorch_model.bin is pickled, .* is refused"
    ):
        open_autoencoder(folder)


def test_safetensors_are_preferred_to_pickled_weights(vae, vae_copy):
    (vae_copy[0] / "diffusion_pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch harmed'\ntR."
    )
    assert (
        open_autoencoder(vae_copy[0]).fingerprint == open_autoencoder(vae).fingerprint
    )


def test_weights_in_several_files_are_refused(vae_copy):
    index = vae_copy[0] / f"{WEIGHTS}.index.json"
    index.write_text(
        json.dumps({"weight_map": {"encoder.conv_in.weight": "../secret.safetensors"}})
    )
    with pytest.raises(ValueError, match="in one file"):
        open_autoencoder(vae_copy[0])


@pytest.mark.parametrize(
    "change", ["missing", "more", "shape", "cut", "empty", "text", "nothing"]
)
def test_weights_that_do_not_fit_are_refused(vae_copy, change):
    folder, _, weights = vae_copy
    if change == "missing":
        del weights["encoder.conv_in.weight"]
    if change == "more":
        weights["encoder.conv_in.more"] = torch.zeros(3)
    if change == "shape":
        weights["encoder.conv_in.weight"] = weights["encoder.conv_in.weight"][
            :2
        ].contiguous()
    save_file({} if change == "nothing" else weights, folder / WEIGHTS)
    written = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(
        {"cut": written[:-100], "empty": b"", "text": b"<html>not found</html>"}.get(
            change, written
        )
    )
    with pytest.raises(
        ValueError,
        match="cannot be read as AutoencoderKL|do not fit config.json, first",
    ):
        open_autoencoder(folder)


def test_half_precision_weights_are_used_in_single_precision(vae, vae_copy):
    folder, _, weights = vae_copy
    save_file({name: value.half() for name, value in weights.items()}, folder / WEIGHTS)
    images = torch.full((1, 3, 8, 8), 0.5)
    z = open_autoencoder(folder).encode(images)
    expected = open_autoencoder(vae).encode(images)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, expected, atol=1e-2, rtol=1e-2)


def test_without_diffusers_the_message_says_how_to_install_it(vae, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(
        ValueError, match=r"need diffusers: pip install 'selfflow\[latents\]'"
    ):
        open_autoencoder(vae)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_and_cpu_agree(vae, tmp_path):
    data = digits()[:20]
    cpu, gpu = (
        encode_latents(
            data, open_autoencoder(vae), tmp_path / name, device=name, bar=False
        )
        for name in ("cpu", "cuda")
    )
    on_cpu = cpu.take(torch.arange(20)).signals
    on_gpu = gpu.take(torch.arange(20)).signals
    torch.testing.assert_close(on_cpu, on_gpu, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(
        cpu.decode(on_cpu), gpu.decode(on_gpu), atol=1e-2, rtol=1e-2
    )


def test_flux2_latents_are_those_of_its_pipeline(tmp_path):
    opened = open_autoencoder(save_model(flux2(), tmp_path))
    assert opened.signal == "image"
    assert opened.latent_shape((3, 8, 12)) == (8, 2, 3)
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        patches = diffusers.Flux2Pipeline._patchify_latents(
            vae.encode(images).latent_dist.mode()
        )
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        deviation = (vae.bn.running_var.view(1, -1, 1, 1) + 1e-4).sqrt()
        expected = (patches - mean) / deviation
        decoded = vae.decode(
            diffusers.Flux2Pipeline._unpatchify_latents(patches)
        ).sample
        # the same as its batch norm in evaluation
        torch.testing.assert_close(vae.bn(patches), expected)
    assert (mean != 0).any()
    assert (deviation != 1).all()
    z = opened.encode(images)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(opened.decode(z), decoded, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("timestep", [False, True])
def test_ltx_latents_are_those_of_its_pipeline(tmp_path, timestep):
    options = {"timestep_conditioning": True} if timestep else {}
    opened = open_autoencoder(save_model(ltx(**options), tmp_path))
    assert opened.signal == "video"
    assert opened.latent_shape((3, 5, 8, 12)) == (3, 3, 2, 3)
    with pytest.raises(ValueError, match=r"\(2 k \+ 1\) x 4 k x 4 k"):
        opened.latent_shape((3, 4, 8, 8))
    videos = torch.rand(2, 3, 5, 8, 12, generator=torch.Generator().manual_seed(1))
    vae = diffusers.AutoencoderKLLTXVideo.from_pretrained(tmp_path).eval()
    scale = vae.config.scaling_factor
    statistics = (vae.latents_mean, vae.latents_std, scale)
    with torch.no_grad():
        mean = vae.encode(videos).latent_dist.mode()
        expected = diffusers.LTXPipeline._normalize_latents(mean, *statistics)
        times = torch.zeros(2) if timestep else None
        decoded = vae.decode(mean, times).sample
        restored = diffusers.LTXPipeline._denormalize_latents(expected, *statistics)
    torch.testing.assert_close(restored, mean, atol=1e-5, rtol=1e-4)
    z = opened.encode(videos)
    torch.testing.assert_close(z, expected)
    assert z.shape == (2, 3, 3, 2, 3)
    assert (vae.latents_std != 1).any()
    torch.testing.assert_close(opened.decode(z), decoded, atol=1e-5, rtol=1e-4)


def test_a_decoder_that_adds_noise_adds_the_same_noise_each_time(tmp_path):
    noisy = ltx(decoder_inject_noise=(True, True, True))
    opened = open_autoencoder(save_model(noisy, tmp_path))
    z = opened.encode(torch.zeros(1, 3, 3, 4, 4))
    before = torch.get_rng_state()
    first = opened.decode(z)
    second = opened.decode(z)
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


# from images to latents and back


@pytest.mark.parametrize("gray", [True, False])
def test_encoded_stored_and_decoded_digits_equal_diffusers(vae, tmp_path, gray):
    data = digits()[:70]
    if not gray:
        data = ImageSet(
            data.images * torch.tensor([1, 0.5, -1])[:, None, None],
            data.labels,
            data.names,
        )
    encode_latents(
        data,
        open_autoencoder(vae),
        tmp_path / "latents",
        batch=16,
        shard_size=32,
        device="cpu",
        bar=False,
    )
    latents = Latents(tmp_path / "latents", autoencoder=vae)
    model = diffusers.AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        posterior = model.encode(data.images.expand(-1, 3, -1, -1)).latent_dist
    z = posterior.mode().double().numpy() * 0.18215
    mean = z.mean((0, 2, 3), keepdims=True)
    deviation = z.std((0, 2, 3), keepdims=True)
    chosen = torch.tensor([69, 0, 31, 32, 5])
    signals = latents.take(chosen).signals
    assert signals["image"].shape == (5, 2, 4, 4)
    assert latents.shapes == {"image": (2, 4, 4)}
    torch.testing.assert_close(
        signals["image"].double(),
        torch.tensor((z - mean) / deviation)[chosen],
        atol=1e-4,
        rtol=1e-4,
    )
    with torch.no_grad():
        expected = model.decode(torch.tensor(z[chosen] / 0.18215).float()).sample
    decoded = latents.decode(signals)["image"]
    assert decoded.shape[1:] == data.shapes["image"]
    torch.testing.assert_close(
        decoded,
        expected.mean(1, keepdim=True) if gray else expected,
        atol=1e-4,
        rtol=1e-4,
    )


def test_another_autoencoder_neither_resumes_nor_decodes(vae, tmp_path):
    other = save_model(kl(3), tmp_path / "other", seed=1)
    data = digits()[:40]
    first = open_autoencoder(vae).fingerprint
    second = open_autoencoder(other).fingerprint
    encode_latents(
        data, open_autoencoder(vae), tmp_path / "latents", device="cpu", bar=False
    )
    with pytest.raises(
        ValueError,
        match=f"something else. autoencoders: .*{first}.* there, .*{second}.* "
        f"requested",
    ):
        encode_latents(
            data, open_autoencoder(other), tmp_path / "latents", device="cpu", bar=False
        )
    with pytest.raises(
        ValueError,
        match=f"image in .* was encoded by autoencoder {first}, not by {second}",
    ):
        Latents(tmp_path / "latents", autoencoder=other)


# Haar, without loss


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_haar_is_the_orthonormal_transform_of_each_block(b, c, h, w, seed):
    images = (
        torch.rand(b, c, 2 * h, 2 * w, generator=torch.Generator().manual_seed(seed))
        * 2
        - 1
    )
    z = Haar().encode(images)
    assert z.shape[1:] == Haar().latent_shape(images.shape[1:])
    for i in range(b):
        for k in range(c):
            for y in range(h):
                for x in range(w):
                    (p, q), (r, s) = images[
                        i, k, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2
                    ].tolist()
                    expected = [
                        (p + q + r + s) / 2,
                        (p - q + r - s) / 2,
                        (p + q - r - s) / 2,
                        (p - q - r + s) / 2,
                    ]
                    assert z[i, 4 * k : 4 * k + 4, y, x].tolist() == pytest.approx(
                        expected, abs=1e-6
                    )
    torch.testing.assert_close(Haar().decode(z), images)
    torch.testing.assert_close(z.square().sum(), images.square().sum())


@pytest.mark.parametrize("shape", [(1, 7, 8), (1, 8, 7), (8, 8), (1, 1, 8, 8)])
def test_haar_refuses_odd_sizes(shape):
    with pytest.raises(ValueError, match="even h and w"):
        Haar().latent_shape(shape)
