"""Autoencoders of diffusers in a folder give what diffusers itself gives."""

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


# what it is, the shape of a signal, the shape of its latents, shift and scale by
# channel
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


def saved(model, folder, seed=0):
    """The folder of a model with random weights, none of which is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        value.data.copy_(
            torch.randn(value.shape, generator=generator)
            / max(value[0].numel() if value.ndim > 1 else 1, 1) ** 0.5
        )
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return saved(kl(3), tmp_path_factory.mktemp("vae"))


@pytest.fixture
def own(vae, tmp_path):
    "A copy that a test may break; returns its folder, its config, its weights."
    (tmp_path / "own").mkdir()
    for name in ("config.json", WEIGHTS):
        (tmp_path / "own" / name).write_bytes((vae / name).read_bytes())
    return (
        tmp_path / "own",
        json.loads((vae / "config.json").read_text()),
        load_file(vae / WEIGHTS),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_the_scaled_mean_that_diffusers_gives(tmp_path, kind):
    make, signal, shape, latent_shape, shift, scale = KINDS[kind]
    model = make()
    opened = open_autoencoder(saved(model, tmp_path))
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
        back = model.decode(expected / scale + shift).sample
    z = opened.encode(signals)
    assert z.shape == (3, *latent_shape)
    assert z.dtype == torch.float32
    assert not z.requires_grad
    assert z.std() > 0.01
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(
        opened.decode(expected), back.mean(1) if signal == "audio" else back
    )
    assert opened.decode(z).shape == signals.shape
    assert torch.equal(z, opened.encode(signals)), "never a sample"
    torch.testing.assert_close(
        opened.encode(signals[1:2]), z[1:2], atol=1e-3, rtol=1e-3
    )


def test_one_channel_is_given_to_each(vae):
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
    opened = open_autoencoder(saved(KINDS[kind][0](), tmp_path))
    with pytest.raises(ValueError, match=words):
        opened.latent_shape(shape)
    with pytest.raises(ValueError, match=words):
        opened.encode(torch.zeros(1, *shape))


def test_a_fingerprint_follows_from_weights_and_config(vae, own):
    folder, config, weights = own
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
    assert open_autoencoder(folder).fingerprint == first, (
        "where it came from is no part of it"
    )
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    scaled = open_autoencoder(folder).fingerprint
    (folder / "config.json").write_text(json.dumps(config))
    weights["encoder.conv_in.weight"][0, 0, 0, 0] += 1e-6
    save_file(weights, folder / WEIGHTS)
    assert len({first, scaled, open_autoencoder(folder).fingerprint}) == 3


def test_nothing_is_fetched_and_no_random_number_is_drawn(vae, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the network was asked")

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
def test_other_configs_are_refused(own, config, words):
    (own[0] / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(ValueError, match=words):
        open_autoencoder(own[0])


def test_pickled_weights_are_refused_unread(own):
    folder, _, _ = own
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


def test_safetensors_are_preferred_to_pickled_weights(vae, own):
    (own[0] / "diffusion_pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch harmed'\ntR."
    )
    assert open_autoencoder(own[0]).fingerprint == open_autoencoder(vae).fingerprint


def test_weights_in_several_files_are_refused(own):
    index = own[0] / f"{WEIGHTS}.index.json"
    index.write_text(
        json.dumps({"weight_map": {"encoder.conv_in.weight": "../secret.safetensors"}})
    )
    with pytest.raises(ValueError, match="in one file"):
        open_autoencoder(own[0])


@pytest.mark.parametrize(
    "change", ["missing", "more", "shape", "cut", "empty", "text", "nothing"]
)
def test_weights_that_do_not_fit_are_refused(own, change):
    folder, _, weights = own
    if change == "missing":
        del weights["encoder.conv_in.weight"]
    if change == "more":
        weights["encoder.conv_in.more"] = torch.zeros(3)
    if change == "shape":
        weights["encoder.conv_in.weight"] = weights["encoder.conv_in.weight"][
            :2
        ].contiguous()
    save_file({} if change == "nothing" else weights, folder / WEIGHTS)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(
        {"cut": whole[:-100], "empty": b"", "text": b"<html>not found</html>"}.get(
            change, whole
        )
    )
    with pytest.raises(
        ValueError,
        match="cannot be read as AutoencoderKL|do not fit config.json, first",
    ):
        open_autoencoder(folder)


def test_half_precision_weights_work_in_single_precision(vae, own):
    folder, _, weights = own
    save_file({name: value.half() for name, value in weights.items()}, folder / WEIGHTS)
    z, expected = (
        open_autoencoder(path).encode(torch.full((1, 3, 8, 8), 0.5))
        for path in (folder, vae)
    )
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
    a, b = (one.take(torch.arange(20)).signals for one in (cpu, gpu))
    torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(cpu.decode(a), gpu.decode(b), atol=1e-2, rtol=1e-2)


def test_flux2_latents_are_those_of_its_pipeline(tmp_path):
    opened = open_autoencoder(saved(flux2(), tmp_path))
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
        back = vae.decode(diffusers.Flux2Pipeline._unpatchify_latents(patches)).sample
        # the same as its batch norm in evaluation
        torch.testing.assert_close(vae.bn(patches), expected)
    assert (mean != 0).any()
    assert (deviation != 1).all()
    z = opened.encode(images)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(opened.decode(z), back, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("timestep", [False, True])
def test_ltx_latents_are_those_of_its_pipeline(tmp_path, timestep):
    more = {"timestep_conditioning": True} if timestep else {}
    opened = open_autoencoder(saved(ltx(**more), tmp_path))
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
        back = vae.decode(mean, times).sample
        again = diffusers.LTXPipeline._denormalize_latents(expected, *statistics)
    torch.testing.assert_close(again, mean, atol=1e-5, rtol=1e-4)
    z = opened.encode(videos)
    torch.testing.assert_close(z, expected)
    assert z.shape == (2, 3, 3, 2, 3)
    assert (vae.latents_std != 1).any()
    torch.testing.assert_close(opened.decode(z), back, atol=1e-5, rtol=1e-4)


def test_a_decoder_that_adds_noise_adds_the_same_again(tmp_path):
    noisy = ltx(decoder_inject_noise=(True, True, True))
    opened = open_autoencoder(saved(noisy, tmp_path))
    z = opened.encode(torch.zeros(1, 3, 3, 4, 4))
    before = torch.get_rng_state()
    first = opened.decode(z)
    second = opened.decode(z)
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


# the whole way


@pytest.mark.parametrize("gray", [True, False])
def test_digits_encoded_read_and_decoded_equal_diffusers(vae, tmp_path, gray):
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
        z = (
            model.encode(data.images.expand(-1, 3, -1, -1))
            .latent_dist.mode()
            .double()
            .numpy()
            * 0.18215
        )
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
    other = saved(kl(3), tmp_path / "other", seed=1)
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


# the lossless one


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
