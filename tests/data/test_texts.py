"""Text encoders in a local folder give the hidden states of transformers.

Nothing is fetched, damaged folders are refused, and runs with stored or live texts
train, resume and sample.
"""

import copy
import json
import multiprocessing
import shutil
import socket
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from selfflow.cli import main
from selfflow.data import texts
from selfflow.data.datasets import caption_bytes, caption_text
from selfflow.data.options import SHARED, DataConfig
from selfflow.data.sources import Sources
from selfflow.data.texts import (
    _SENTENCES,
    Bytes,
    StoredTexts,
    encode_texts,
    open_encoder,
)
from selfflow.method.options import ObjectiveConfig
from selfflow.report import sample_sections
from selfflow.training.batches import Batches, Validation
from selfflow.training.config import Config
from selfflow.training.loop import train
from selfflow.training.run import Run

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
WORDS = (
    "a small large red green blue star circle square on striped ground upper left of "
    "the"
).split()
CAPTIONS = (
    "a red star",
    "a small blue circle on a striped ground, upper left",
    "",
    "ein weißer Stern \U0001f31f",
    "half a \ud83d pair",
    "  \n",
    "unheard of",
    "a red star",
    "the " * 40,
)


def save_tokenizer(folder, clip=False):
    "Save a tokenizer: words with begin and end for CLIP, bytes with end for T5."
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    pieces = special + (WORDS if clip else sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if clip:
        tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokens = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
        tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if clip else "$A </s>",
        special_tokens=[("<s>", 3), ("</s>", 1)],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
    ).save_pretrained(folder)
    return len(vocabulary)


T5 = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
CLIP = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 10,
    "bos_token_id": 3,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def clip_model(size):
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=CLIP | {"vocab_size": size},
            vision_config=vision,
            projection_dim=4,
        )
    )


KINDS = {
    "t5": lambda size: transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=size, **T5)
    ),
    "t5, gated": lambda size: transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=size + 5, feed_forward_proj="gated-gelu", **T5)
    ),
    "t5, full": lambda size: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=size, **T5)
    ),
    "mt5": lambda size: transformers.MT5EncoderModel(
        transformers.MT5Config(vocab_size=size, **T5)
    ),
    "umt5": lambda size: transformers.UMT5EncoderModel(
        transformers.UMT5Config(vocab_size=size, **T5)
    ),
    "clip": lambda size: transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=size, **CLIP)
    ),
    "clip, full": clip_model,
    "clip, projected": lambda size: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(vocab_size=size, **CLIP)
    ),
}


def save_encoder(folder, kind="t5", seed=0, **options):
    """Save an encoder with random weights, none of them zero or one, in a folder."""
    model = KINDS[kind](save_tokenizer(folder, "clip" in kind))
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        inputs = value[0].numel() if value.ndim > 1 else 1
        noise = torch.randn(value.shape, generator=generator)
        value.data.copy_(noise / max(inputs, 1) ** 0.5)
    model.eval().save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        kind: save_encoder(tmp_path_factory.mktemp("encoder"), kind) for kind in KINDS
    }


@pytest.fixture(params=["t5", "clip"])
def encoder(folders, request):
    return open_encoder(folders[request.param])


@pytest.fixture
def t5_copy(folders, tmp_path):
    "A copy of the T5 encoder that a test may damage."
    return shutil.copytree(folders["t5"], tmp_path / "copy")


def clear_cache(opened):
    "Empty the cache, as in a new process."
    opened._cache.clear()
    opened._cached_bytes = 0


def expected_states(folder, kind, text, tokens):
    """Return the hidden states (n, e) and ids of transformers for one text."""
    name = {
        "t": "T5EncoderModel",
        "m": "MT5EncoderModel",
        "u": "UMT5EncoderModel",
        "c": "CLIPTextModel",
    }[kind[0]]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    limit = min(tokens, 10) if kind[0] == "c" else tokens
    tokenizer_of_folder = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    inputs = tokenizer_of_folder(
        text, truncation=True, max_length=limit, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return output.last_hidden_state[0], inputs["input_ids"][0]


# vectors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [5, 24])
def test_vectors_are_the_hidden_states_of_transformers_times_a_constant(
    folders, kind, tokens
):
    opened = open_encoder(folders[kind])
    vectors = opened.encode(CAPTIONS, tokens)
    assert vectors.shape == (len(CAPTIONS), tokens, opened.width)
    assert vectors.dtype == torch.float32
    assert not opened.model.training
    assert not any(value.requires_grad for value in opened.model.parameters())
    for text, row in zip(CAPTIONS, vectors, strict=True):
        if not text.strip():
            assert not row.any(), "an empty text has no vectors"
            continue
        states, ids = expected_states(
            folders[kind], kind, text.encode("utf-8", "replace").decode(), tokens
        )
        assert torch.equal(row[: len(states)], states * opened.scale)
        assert not row[len(states) :].any()
        assert ids[-1] == 1, "the last token marks the end, even of a text that is cut"
    assert torch.equal(vectors[0], vectors[7])
    assert len(expected_states(folders[kind], kind, CAPTIONS[-1], tokens)[1]) == (
        min(tokens, 10) if kind[0] == "c" else tokens
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_batch_of_transformers_gives_the_same_vectors(folders, kind):
    opened = open_encoder(folders[kind])
    captions = [
        text
        for text in CAPTIONS
        if text.strip() and text.isprintable() and "\ud83d" not in text
    ]
    inputs = opened.tokenizer(
        captions, padding=True, truncation=True, max_length=10, return_tensors="pt"
    )
    with torch.no_grad():
        states = opened.model(
            inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).last_hidden_state
    expected = states * inputs["attention_mask"][..., None] * opened.scale
    torch.testing.assert_close(
        opened.encode(captions, 10)[:, : states.shape[1]],
        expected,
        atol=1e-4,
        rtol=1e-4,
    )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text(max_size=12), min_size=1, max_size=5),
    st.integers(3, 14),
    st.randoms(use_true_random=False),
)
def test_a_text_is_encoded_independently_of_its_batch(
    folders, captions, tokens, chance
):
    for kind in ("t5", "clip"):
        opened = open_encoder(folders[kind])
        clear_cache(opened)
        vectors = opened.encode(captions, tokens)
        order = list(range(len(captions)))
        chance.shuffle(order)
        assert torch.equal(
            opened.encode([captions[i] for i in order], tokens), vectors[order]
        )
        clear_cache(opened)
        for i in order:
            assert torch.equal(opened.encode([captions[i]], tokens)[0], vectors[i]), (
                "the cache does not change the result"
            )


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_of_unit_size(folders, kind):
    opened = open_encoder(folders[kind])
    rows = opened.encode(_SENTENCES, 64)
    written = rows[rows.any(-1)]
    assert written.square().mean().sqrt().item() == pytest.approx(
        1, abs=1e-2 if kind[0] == "c" else 6e-3
    )
    assert opened.scale == float(f"{opened.scale:.3g}")


def test_small_hidden_states_are_scaled_up(t5_copy, folders):
    weights = load_file(t5_copy / "model.safetensors")
    weights["encoder.final_layer_norm.weight"] *= 0.01
    save_file(weights, t5_copy / "model.safetensors", {"format": "pt"})
    small = open_encoder(t5_copy)
    large = open_encoder(folders["t5"])
    assert small.scale == pytest.approx(100 * large.scale, rel=0.01)
    torch.testing.assert_close(
        small.encode(CAPTIONS, 8), large.encode(CAPTIONS, 8), atol=0.02, rtol=0.02
    )


def test_an_empty_list_has_no_vectors_and_other_types_are_refused(encoder):
    assert encoder.encode([], 8).shape == (0, 8, encoder.width)
    for wrong in ("a red star", ["a", 3], [None], torch.zeros(2, 3)):
        with pytest.raises(TypeError, match="expected a sequence of texts"):
            encoder.encode(wrong, 8)


def test_too_few_tokens_for_any_text_are_refused(folders):
    with pytest.raises(
        ValueError,
        match="1 tokens only hold the marks of this encoder and no text; set "
        "data.caption to 2 or more",
    ):
        open_encoder(folders["t5"]).encode(["a"], 1)
    with pytest.raises(ValueError, match="set data.caption to 3 or more"):
        open_encoder(folders["clip"]).encode(["a"], 2)
    assert open_encoder(folders["clip"]).encode(["a"], 3).any(-1).all()


def test_byte_captions_have_not_changed():
    row = Bytes().encode(["ein weißer Stern"], 24)
    assert torch.equal(row, caption_bytes(["ein weißer Stern"], 24))
    assert Bytes().width == 0
    assert Bytes().fingerprint == ""


# the cache


def test_each_text_is_encoded_once_and_the_oldest_is_evicted(encoder, monkeypatch):
    clear_cache(encoder)
    encoded = []
    states = encoder._states
    monkeypatch.setattr(
        encoder,
        "_states",
        lambda text, tokens: encoded.append(text) or states(text, tokens),
    )
    first = encoder.encode(["a red star", "a blue star", "a red star"], 6)
    assert encoded == ["a red star", "a blue star"]
    assert torch.equal(first, encoder.encode(["a red star", "a blue star"] * 2, 6)[:3])
    assert encoded == ["a red star", "a blue star"]
    encoder.encode(["a red star"], 5)
    assert encoded[2:] == ["a red star"], "another length is encoded again"
    monkeypatch.setattr(texts, "_CACHE_BYTES", 3 * 6 * encoder.width * 4)
    clear_cache(encoder)
    encoded.clear()
    captions = [
        f"{word} star on the green ground" for word in ("red", "blue", "small", "large")
    ]
    # evicts the second
    encoder.encode([captions[0], captions[1], captions[2], captions[0], captions[3]], 6)
    encoder.encode([captions[0], captions[2], captions[3]], 6)
    assert encoded == captions
    assert (
        encoder._cached_bytes
        == sum(vectors.nbytes for vectors in encoder._cache.values())
        == 3 * 6 * encoder.width * 4
    )
    encoder.encode([captions[1]], 6)
    assert encoded == [*captions, captions[1]]
    monkeypatch.setattr(texts, "_CACHE_BYTES", 0)
    assert torch.equal(encoder.encode(captions, 6), encoder.encode(captions, 6))
    assert encoder._cached_bytes == 0
    assert not encoder._cache


def test_changing_returned_vectors_leaves_the_cache_unchanged(encoder):
    vectors = encoder.encode(["a red star"], 6)
    expected = vectors.clone()
    vectors.zero_()
    assert torch.equal(encoder.encode(["a red star"], 6), expected)


def test_a_lock_held_during_a_fork_does_not_block(encoder):
    expected = encoder.encode(["a green star"], 6)
    clear_cache(encoder)
    with encoder._lock:
        assert torch.equal(encoder.encode(["a green star"], 6), expected)
        assert not encoder._cache


def encode_in_process(encoders, queue):
    queue.put([each.encode(["a red star", ""], 6).tolist() for each in encoders])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_give_the_same_vectors(folders, method, capfd):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    encoders = [open_encoder(folders[kind]) for kind in ("t5", "clip")]
    expected = [each.encode(["a red star", ""], 6).tolist() for each in encoders]
    process = context.Process(target=encode_in_process, args=(encoders, queue))
    process.start()
    assert queue.get(timeout=120) == expected
    process.join(60)
    assert process.exitcode == 0
    assert "forked" not in capfd.readouterr().err


def test_the_number_of_threads_changes_nothing(encoder):
    expected = encoder.encode(CAPTIONS, 8)
    before = torch.get_num_threads()
    clear_cache(encoder)
    torch.set_num_threads(2)
    try:
        assert torch.equal(encoder.encode(CAPTIONS, 8), expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with torch.autocast("cpu", torch.bfloat16):
        clear_cache(encoder)
        assert torch.equal(encoder.encode(CAPTIONS, 8), expected)


# the fingerprint


def test_a_fingerprint_depends_on_weights_config_and_tokenizer(folders, t5_copy):
    first = open_encoder(folders["t5"]).fingerprint
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert (
        open_encoder(t5_copy).fingerprint
        == first
        == open_encoder(str(t5_copy)).fingerprint
    )
    config = json.loads((t5_copy / "config.json").read_text())
    (t5_copy / "config.json").write_text(
        json.dumps(
            config | {"transformers_version": "9.9", "_name_or_path": "elsewhere"}
        )
    )
    assert open_encoder(t5_copy).fingerprint == first, "its origin is no part of it"
    fingerprints = {first}
    (t5_copy / "config.json").write_text(
        json.dumps(config | {"layer_norm_epsilon": 1e-3})
    )
    fingerprints.add(open_encoder(t5_copy).fingerprint)
    (t5_copy / "config.json").write_text(json.dumps(config))
    weights = load_file(t5_copy / "model.safetensors")
    weights["shared.weight"][0, 0] += 1e-6
    save_file(weights, t5_copy / "model.safetensors", {"format": "pt"})
    fingerprints.add(open_encoder(t5_copy).fingerprint)
    tokenizer_json = (t5_copy / "tokenizer.json").read_text()
    (t5_copy / "tokenizer.json").write_text(
        tokenizer_json.replace(
            '"add_prefix_space":false', '"add_prefix_space":true'
        ).replace('"add_prefix_space": false', '"add_prefix_space": true')
    )
    fingerprints.add(open_encoder(t5_copy).fingerprint)
    assert len(fingerprints) == 4


def test_an_open_encoder_is_shared_until_its_files_change(t5_copy):
    first = open_encoder(t5_copy)
    assert open_encoder(t5_copy) is first
    assert copy.deepcopy(first) is first
    weights = load_file(t5_copy / "model.safetensors")
    save_file(
        {name: value * 1.5 for name, value in weights.items()},
        t5_copy / "model.safetensors",
        {"format": "pt"},
    )
    assert open_encoder(t5_copy) is not first
    assert open_encoder(t5_copy).fingerprint != first.fingerprint


def test_the_folder_of_a_diffusers_model_opens(folders, tmp_path):
    for number, kind in (("", "clip"), ("_2", "t5")):
        for name, part in (
            ("text_encoder", ("config.json", "model.safetensors")),
            ("tokenizer", ("tokenizer.json", "tokenizer_config.json")),
        ):
            (tmp_path / f"{name}{number}").mkdir()
            for file in part:
                shutil.copy(folders[kind] / file, tmp_path / f"{name}{number}" / file)
    for place, kind in (
        (tmp_path, "clip"),
        (tmp_path / "text_encoder", "clip"),
        (tmp_path / "text_encoder_2", "t5"),
    ):
        opened = open_encoder(place)
        assert opened.fingerprint == open_encoder(folders[kind]).fingerprint
        assert torch.equal(
            opened.encode(CAPTIONS, 7), open_encoder(folders[kind]).encode(CAPTIONS, 7)
        )
    shutil.rmtree(tmp_path / "tokenizer_2")
    with pytest.raises(
        ValueError,
        match="there is no tokenizer in .*text_encoder_2 or .*tokenizer_2, none of "
        "tokenizer.json",
    ):
        open_encoder(tmp_path / "text_encoder_2")


def test_sharded_weights_open_and_bad_indices_are_refused(folders, tmp_path):
    sharded = save_encoder(tmp_path, "t5", max_shard_size="4KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert torch.equal(
        open_encoder(sharded).encode(CAPTIONS, 9),
        open_encoder(folders["t5"]).encode(CAPTIONS, 9),
    )
    index = sharded / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    name = next(iter(contents["weight_map"]))
    for wrong in ("../secret.safetensors", "absent.safetensors"):
        index.write_text(
            json.dumps(
                contents | {"weight_map": contents["weight_map"] | {name: wrong}}
            )
        )
        with pytest.raises(ValueError, match=f"has no weights {wrong}"):
            open_encoder(sharded)
    for broken, words in (
        ("[]", "cannot be used"),
        ("{", "cannot be used"),
        ("{}", "has no weights model.safetensors"),
        ('{"weight_map": 3}', "has no weights"),
    ):
        index.write_text(broken)
        with pytest.raises(ValueError, match=words):
            open_encoder(sharded)


def test_half_precision_weights_are_used_in_single_precision(folders, tmp_path):
    for kind in ("t5", "clip"):
        shutil.copytree(folders[kind], tmp_path / kind)
        file = tmp_path / kind / "model.safetensors"
        save_file(
            {name: value.half() for name, value in load_file(file).items()},
            file,
            {"format": "pt"},
        )
        config = json.loads((tmp_path / kind / "config.json").read_text())
        (tmp_path / kind / "config.json").write_text(
            json.dumps(config | {"dtype": "float16"})
        )
        half = open_encoder(tmp_path / kind).encode(CAPTIONS, 8)
        single = open_encoder(folders[kind]).encode(CAPTIONS, 8)
        assert half.dtype == torch.float32
        assert not torch.equal(half, single)
        torch.testing.assert_close(half, single, atol=0.05, rtol=0.05)


# refusals


def test_nothing_is_fetched_and_no_random_number_is_drawn(
    folders, tmp_path, monkeypatch, capfd
):
    def refuse(*args, **options):
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.enable_progress_bar()
    try:
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        for kind in ("t5, full", "clip, full"):
            shutil.copytree(folders[kind], tmp_path / kind)
            open_encoder(tmp_path / kind).encode(CAPTIONS, 8)
        assert torch.equal(before[0], torch.get_rng_state())
        assert (before[1] == np.random.get_state()[1]).all()
        assert (
            transformers.utils.logging.get_verbosity()
            == transformers.utils.logging.WARNING
        )
        assert transformers.utils.logging.is_progress_bar_enabled()
        assert not capfd.readouterr().err
    finally:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    for name in (
        "google/t5-v1_1-base",
        "https://example.org/t5",
        tmp_path / "deeper",
        folders["t5"] / "config.json",
        "",
    ):
        with pytest.raises(
            ValueError,
            match="not a local folder with a text encoder .*, and nothing is fetched",
        ):
            open_encoder(name)


@pytest.mark.parametrize(
    "config, words",
    [
        ("", "config.json cannot be used"),
        ("[]", "not an object with names"),
        ("{}", "unknown text encoder, .*'None'"),
        ("[" * 100000, "cannot be used"),
        (
            '{"model_type": "t6"}',
            "unknown text encoder, model_type in .*, 't6'; known are t5",
        ),
        ('{"model_type": ["t5"]}', "unknown text encoder"),
        ('{"model_type": "bert"}', "known are t5, mt5, umt5, clip"),
        ("\xff\xfe", "cannot be used"),
        (
            '{"model_type": "t5", "auto_map": {"AutoModel": "own.Model"}}',
            "code of its own",
        ),
        (
            '{"model_type": "t5", "d_model": 32}',
            "cannot be read as T5EncoderModel|do not fit config.json",
        ),
        (
            '{"model_type": "clip"}',
            "cannot be read as CLIPTextModel|do not fit config.json",
        ),
    ],
)
def test_unsuitable_configs_are_refused(t5_copy, config, words):
    (t5_copy / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(ValueError, match=words):
        open_encoder(t5_copy)


def test_pickled_weights_are_refused_without_being_read(t5_copy, folders):
    malicious = b"cos\nsystem\n(S'touch harmed'\ntR."
    (t5_copy / "pytorch_model.bin").write_bytes(malicious)
    assert (
        open_encoder(t5_copy).fingerprint == open_encoder(folders["t5"]).fingerprint
    ), "the safetensors next to them are used"
    (t5_copy / "model.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match="has no weights model.safetensors; pytorch_model.bin is pickled, .* is "
        "refused",
    ):
        open_encoder(t5_copy)
    (t5_copy / "pytorch_model.bin").unlink()
    with pytest.raises(
        ValueError,
        match="has no weights model.safetensors; save it by save_pretrained",
    ):
        open_encoder(t5_copy)


@pytest.mark.parametrize(
    "change", ["missing", "shape", "nothing", "cut", "empty", "text", "nan", "zero"]
)
def test_weights_that_do_not_fit_are_refused(t5_copy, change):
    weights = load_file(t5_copy / "model.safetensors")
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    if change == "missing":
        del weights[name]
    if change == "shape":
        weights[name] = weights[name][:2].contiguous()
    if change in ("nan", "zero"):
        weights["encoder.final_layer_norm.weight"][:] = (
            float("nan") if change == "nan" else 0
        )
    save_file(
        {} if change == "nothing" else weights,
        t5_copy / "model.safetensors",
        {"format": "pt"},
    )
    written = (t5_copy / "model.safetensors").read_bytes()
    (t5_copy / "model.safetensors").write_bytes(
        {"cut": written[:-100], "empty": b"", "text": b"<html>"}.get(change, written)
    )
    with pytest.raises(
        ValueError,
        match="cannot be read as T5EncoderModel|do not fit config.json, first|weights "
        "are damaged",
    ):
        open_encoder(t5_copy)


def test_a_tokenizer_of_another_encoder_is_refused(t5_copy, folders):
    tokenizer_config = json.loads((t5_copy / "tokenizer_config.json").read_text())
    (t5_copy / "tokenizer_config.json").write_text(
        json.dumps(
            tokenizer_config | {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
        )
    )
    with pytest.raises(
        ValueError,
        match="tokenizer_config.json needs code of its own .auto_map., which is never "
        "run",
    ):
        open_encoder(t5_copy)
    for broken in ("{", "[]"):
        (t5_copy / "tokenizer_config.json").write_text(broken)
        with pytest.raises(ValueError, match="tokenizer_config.json cannot be used"):
            open_encoder(t5_copy)
    (t5_copy / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    tokenizer_json = (t5_copy / "tokenizer.json").read_text()
    (t5_copy / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="with its tokenizer"):
        open_encoder(t5_copy)
    (t5_copy / "tokenizer.json").write_text(tokenizer_json)
    wrong = shutil.copytree(folders["clip"], t5_copy.parent / "wrong")
    shutil.copy(t5_copy / "tokenizer.json", wrong / "tokenizer.json")
    with pytest.raises(
        ValueError,
        match="the tokenizer counts to 259, the encoder to 19; get both from one "
        "source",
    ):
        open_encoder(wrong)
    (t5_copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="there is no tokenizer in"):
        open_encoder(t5_copy)


def test_without_transformers_the_message_says_how_to_install_it(t5_copy, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ValueError, match=r"need transformers: pip install 'selfflow\[texts\]'"
    ):
        open_encoder(t5_copy)


# in a run


def run_with(folder, steps=4, **data):
    "Settings of a run on captions of `shapes` with an encoder."
    data = {
        "size": 16,
        "patch": 8,
        "condition": "caption",
        "caption": 12,
        "encoder": str(folder),
    } | data
    training = replace(
        TINY.training,
        steps=steps,
        batch=8,
        shards=4,
        save_every=2,
        validate_every=2,
        validation=5,
        sample_every=4,
        log_every=1,
    )
    return Config(
        name="captions",
        data=DataConfig("shapes", **data),
        training=training,
        objective=ObjectiveConfig(label_drop=0.3),
        model=replace(TINY.model, width=32, positions=None),
    )


def test_an_encoder_needs_captions():
    for condition in ("class", "none"):
        with pytest.raises(
            ValueError,
            match="data.encoder '.*x' needs captions, but data.condition is "
            f"'{condition}'; set it to caption",
        ):
            DataConfig("shapes", condition=condition, encoder="x")
    assert DataConfig("shapes").encoder == ""
    assert Config.from_dict({"data": {"name": "shapes"}}).data.encoder == ""


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_conditions_are_the_vectors_of_the_encoder(folders, kind):
    config = run_with(folders[kind])
    opened = open_encoder(folders[kind])
    sources = Sources(config.data)
    inputs = sources.inputs
    assert (inputs.caption, inputs.caption_width, inputs.classes) == (
        12,
        opened.width,
        0,
    )
    condition = sources.take("shapes", torch.arange(4)).condition
    captions = sources.data["shapes"].take(torch.arange(4)).captions
    assert condition.kind == "vectors"
    assert torch.equal(condition.values, opened.encode(captions, 12))
    assert torch.equal(condition.values, sources.condition_for(captions).values)
    assert sources.condition_for(condition) is condition, (
        "a condition is returned unchanged"
    )
    for wrong in (
        [1, 2],
        torch.zeros(2, dtype=torch.int64),
        caption_bytes(captions, 12),
    ):
        with pytest.raises(
            ValueError, match="conditioned on captions here; pass texts"
        ):
            sources.condition_for(wrong)
    judged, _ = Validation.of(config).data["shapes"]
    assert judged.condition.values.shape == (5, 12, opened.width)
    notes = DataConfig("notes", **{name: getattr(config.data, name) for name in SHARED})
    mixture = replace(
        config, data=(config.data, notes), model=replace(config.model, positions=None)
    )
    inputs = Sources(mixture.data).inputs
    assert (inputs.caption, inputs.caption_width) == (12, opened.width)
    assert len(inputs.parts) == 2


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_run_trains_stops_and_resumes_bit_for_bit(folders, tmp_path, kind):
    config = run_with(folders[kind])
    run = train(config, tmp_path / "uninterrupted", "cpu", bar=False)
    assert run.log["validation_flow_loss"].notna().sum() == 2
    assert [step for step, *_ in run.sample_history()] == [4]
    train(config, tmp_path / "interrupted", "cpu", bar=False)
    opened = open_encoder(folders[kind])
    for workers in (0, 2):
        shutil.rmtree(tmp_path / "interrupted/captions/checkpoints/step-00000004")
        clear_cache(opened)
        again = train(
            config, tmp_path / "interrupted", "cpu", workers=workers, bar=False
        )
        assert_same(run, again)
    assert (
        json.loads((run.path / "config.json").read_text())["data"]["encoder"]
        == opened.fingerprint
    )


def test_workers_do_not_change_the_batches(folders):
    config = run_with(folders["t5"])
    batches = Batches(Sources(config.data), config)
    alone = list(batches.loader())
    for workers in (1, 2):
        for expected, actual in zip(
            alone, batches.loader(workers=workers), strict=True
        ):
            assert torch.equal(expected.indices, actual.indices)
            assert torch.equal(expected.x0, actual.x0)
            assert torch.equal(expected.condition.values, actual.condition.values)
    assert expected.condition.kind == "vectors"
    assert expected.condition.values.any()


@pytest.fixture(scope="module")
def captions_run(folders, tmp_path_factory):
    "A run conditioned on captions by a copy of the T5; tests undo their changes."
    folder = tmp_path_factory.mktemp("captions")
    shutil.copytree(folders["t5"], folder / "encoder")
    return train(run_with(folder / "encoder"), folder, "cpu", bar=False)


def test_texts_are_sampled_with_guidance(captions_run):
    run = Run.open(captions_run.path, "cpu")
    captions = ["a red star", "étoile \U0001f31f", "", "a blue circle"]
    plain, guided = (
        run.sample(captions, steps=3, cfg_scale=w)["image"] for w in (1.0, 4.0)
    )
    assert plain.shape == guided.shape == (4, 3, 16, 16)
    assert plain.isfinite().all()
    assert guided.isfinite().all()
    assert not torch.equal(plain[0], guided[0])
    # guidance starts from the empty text
    torch.testing.assert_close(plain[2], guided[2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        plain, run.sample(captions, steps=3, batch=3)["image"], atol=1e-5, rtol=1e-4
    )
    assert torch.equal(
        plain, run.sample(run.sources.condition_for(captions), steps=3)["image"]
    )


def test_the_command_line_samples_texts(captions_run, capsys):
    captions = ["a red star", "ein weißer Stern"]
    main(
        [
            "sample",
            str(captions_run.path),
            "--captions",
            *captions,
            "--each",
            "2",
            "--steps",
            "2",
            "--cfg-scale",
            "2",
            "--device",
            "cpu",
        ]
    )
    assert "4 samples are in" in capsys.readouterr().out
    (file,) = (captions_run.path / "samples").glob("*-4-labels-*.safetensors")
    samples = load_file(file)
    assert [caption_text(row) for row in samples["labels"]] == [captions[0]] * 2 + [
        captions[1]
    ] * 2, "the texts, not vectors"
    main(
        [
            "sample",
            str(captions_run.path),
            "--each",
            "1",
            "--steps",
            "2",
            "--device",
            "cpu",
        ]
    )
    (file,) = (captions_run.path / "samples").glob("*-10-labels-*.safetensors")
    assert (
        caption_text(load_file(file)["labels"][0])
        == Sources(captions_run.config.data, "test")
        .data["shapes"]
        .take(torch.tensor([0]))
        .captions[0]
    )
    with pytest.raises(SystemExit):
        main(["sample", str(captions_run.path), "--labels", "1", "--device", "cpu"])
    assert "trained with captions, not classes" in capsys.readouterr().err


def test_another_encoder_neither_resumes_nor_samples(captions_run, folders, tmp_path):
    encoder = captions_run.path.parent / "encoder"
    config = (captions_run.path / "config.json").read_bytes()
    weights = (encoder / "model.safetensors").read_bytes()
    save_encoder(encoder, "t5", seed=1)
    try:
        with pytest.raises(
            ValueError,
            match="contains a run with different data:\n  data.encoder: '[0-9a-f]{16}' "
            "in the folder",
        ):
            train(run_with(encoder), captions_run.path.parent, "cpu", bar=False)
        with pytest.raises(
            ValueError,
            match="was trained with text encoder [0-9a-f]{16}, "
            "but the one in .*encoder is [0-9a-f]{16}",
        ):
            Run.open(captions_run.path, "cpu").sample(["a red star"], steps=2)
    finally:
        (encoder / "model.safetensors").write_bytes(weights)
    assert (
        Run.open(captions_run.path, "cpu")
        .sample(["a red star"], steps=2)["image"]
        .isfinite()
        .all()
    )
    with pytest.raises(
        ValueError,
        match="different settings.*\n  inputs.caption_width: 16 in the folder, "
        "0 requested",
    ):
        train(run_with(""), captions_run.path.parent, "cpu", bar=False)
    assert (captions_run.path / "config.json").read_bytes() == config


def test_an_encoder_may_be_moved(captions_run, tmp_path, capsys):
    shutil.copytree(captions_run.path, tmp_path / "captions")
    shutil.copytree(captions_run.path.parent / "encoder", tmp_path / "moved")
    shutil.rmtree(tmp_path / "captions/checkpoints/step-00000004")
    again = train(run_with(tmp_path / "moved"), tmp_path, "cpu", bar=False)
    assert "data.encoder: " in capsys.readouterr().out
    assert again.config.data.encoder == str(tmp_path / "moved")
    assert_same(captions_run, again)
    assert Run.open(again.path, "cpu").config.data.encoder == str(tmp_path / "moved")


def test_a_run_whose_encoder_cannot_be_read_leaves_no_folder(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    for folder, words in (
        (tmp_path / "absent", "nothing is fetched"),
        (tmp_path / "bert", "unknown text encoder"),
    ):
        with pytest.raises(ValueError, match=words):
            train(run_with(folder), tmp_path / "runs", "cpu", bar=False)
    assert not (tmp_path / "runs").exists()


def test_too_short_captions_leave_no_folder(folders, tmp_path):
    with pytest.raises(ValueError, match="set data.caption to 3 or more"):
        train(run_with(folders["clip"], caption=2), tmp_path / "runs", "cpu", bar=False)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("caption", [3, 40])
def test_shorter_and_longer_captions_train(folders, tmp_path, caption):
    run = train(
        run_with(folders["clip"], steps=2, caption=caption), tmp_path, "cpu", bar=False
    )
    assert run.inputs.caption == caption
    assert run.log["flow_loss"].notna().all()


def test_the_command_line_trains_and_reports_mistakes(
    folders, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sample_sections, "_METHOD", "PCA")  # UMAP would compile first
    arguments = [
        "train",
        "--name",
        "cli",
        "--folder",
        str(tmp_path),
        "--data.name",
        "shapes",
        "--data.size",
        "16",
        "--data.patch",
        "8",
        "--data.condition",
        "caption",
        "--data.caption",
        "8",
        "--model.width",
        "32",
        "--model.depth",
        "2",
        "--model.heads",
        "2",
        "--training.steps",
        "2",
        "--training.batch",
        "8",
        "--training.validation",
        "4",
        "--device",
        "cpu",
    ]
    with pytest.raises(SystemExit):
        main([*arguments, "--data.encoder", str(tmp_path / "absent")])
    message = capsys.readouterr().err
    assert message.startswith("selfflow: ")
    assert "nothing is fetched" in message
    assert message.count("\n") == 1
    main([*arguments, "--data.encoder", str(folders["t5"])])
    assert "is trained: 2 steps" in capsys.readouterr().out
    main(
        [
            "report",
            str(tmp_path / "cli"),
            "--output",
            str(tmp_path / "r.html"),
            "--device",
            "cpu",
        ]
    )
    assert str(folders["t5"]) in (tmp_path / "r.html").read_text()


def test_the_tokenizer_files_of_an_older_clip_are_read(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [
        *alphabet,
        *(f"{piece}</w>" for piece in alphabet),
        "st",
        "re",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/vocab.json").write_text(
        json.dumps({piece: number for number, piece in enumerate(pieces)})
    )
    (tmp_path / "tokenizer/merges.txt").write_text("#version: 0.2\ns t\nr e\n")
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 77,
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
            }
        )
    )
    KINDS["clip"](len(pieces)).eval().save_pretrained(tmp_path / "text_encoder")
    opened = open_encoder(tmp_path)
    read = opened.tokenizer("red Star")["input_ids"]
    assert [pieces[number] for number in read] == [
        "<|startoftext|>",
        "re",
        "d</w>",
        "st",
        "a",
        "r</w>",
        "<|endoftext|>",
    ]
    assert opened.encode(["red star"], 9).any(-1).sum() == 7
    assert not opened.encode([""], 9).any()


# stored vectors and pooled ones


@pytest.mark.parametrize("kind", ["clip", "clip, projected"])
def test_pooled_vectors_are_those_of_transformers(folders, kind):
    clip = folders[kind]
    t5 = folders["t5"]
    opened = open_encoder(t5, [str(clip), str(clip)])
    name = "CLIPTextModelWithProjection" if "projected" in kind else "CLIPTextModel"
    model = getattr(transformers, name).from_pretrained(clip).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(clip)
    with torch.no_grad():
        output = model(**tokens("a red star", return_tensors="pt"))
    expected = output.text_embeds if "projected" in kind else output.pooler_output
    pooled = opened.pooled(["a red star", "", "a blue star"])
    torch.testing.assert_close(pooled[0], expected[0].repeat(2))
    assert not pooled[1].any()
    assert not torch.equal(pooled[0], pooled[2])
    assert opened.pooled_width == pooled.shape[1]
    assert opened.width == 16
    assert torch.equal(
        opened.encode(CAPTIONS[:3], 12), open_encoder(t5).encode(CAPTIONS[:3], 12)
    )
    assert opened.fingerprint != open_encoder(t5).fingerprint
    with pytest.raises(ValueError, match="is no CLIP"):
        open_encoder(t5, [str(t5)])


@pytest.mark.parametrize("pooled", [False, True])
def test_stored_texts_are_the_vectors_of_the_encoder(
    folders, tmp_path, pooled, monkeypatch
):
    encoder = open_encoder(folders["t5"], [str(folders["clip"])] if pooled else [])
    encoded = []
    encode = type(encoder).encode

    def watched(self, captions, tokens):
        encoded.extend(captions)
        return encode(self, captions, tokens)

    monkeypatch.setattr(type(encoder), "encode", watched)
    stored = encode_texts(CAPTIONS, encoder, tmp_path, 12, shard_size=3, bar=False)
    assert len(stored) == len(set(CAPTIONS)) == len(encoded)
    assert len(list(tmp_path.glob("texts-*.safetensors"))) == 3
    opened = open_encoder(tmp_path)
    assert isinstance(opened, StoredTexts)
    assert opened.fingerprint == encoder.fingerprint
    assert torch.equal(opened.encode(CAPTIONS, 12), encode(encoder, CAPTIONS, 12))
    if pooled:
        assert torch.equal(opened.pooled(CAPTIONS), encoder.pooled(CAPTIONS))
    # a new text goes to the encoder
    encoded.clear()
    new = ["a green square"]
    assert torch.equal(opened.encode(new, 12), encode(encoder, new, 12))
    with pytest.raises(ValueError, match="stored for 12 tokens, not 9"):
        opened.encode(CAPTIONS, 9)
    with pytest.raises(ValueError, match="leave data.pooled out"):
        open_encoder(tmp_path, ["elsewhere"])
    # damage is detected, and only the damaged shard is encoded again
    shard = tmp_path / "texts-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="texts-00001.safetensors is missing or was"):
        open_encoder(tmp_path)
    encoded.clear()
    encode_texts(CAPTIONS, encoder, tmp_path, 12, shard_size=3, bar=False)
    assert len(encoded) == 3
    with pytest.raises(ValueError, match="holds other texts: tokens is 12 there, 14"):
        encode_texts(CAPTIONS, encoder, tmp_path, 14, shard_size=3, bar=False)


def test_interrupted_encoding_is_reported_and_resumes(folders, tmp_path, monkeypatch):
    encoder = open_encoder(folders["t5"])

    class Stopped(Exception):
        pass

    def stop(captions, tokens):
        if captions[0] == "":
            raise Stopped
        return type(encoder).encode(encoder, captions, tokens)

    monkeypatch.setattr(encoder, "encode", stop, raising=False)
    with pytest.raises(Stopped):
        encode_texts(CAPTIONS, encoder, tmp_path, 12, shard_size=2, bar=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="2 of 8 texts; run encode_texts again"):
        open_encoder(tmp_path)
    stored = encode_texts(CAPTIONS, encoder, tmp_path, 12, shard_size=2, bar=False)
    assert torch.equal(stored.encode(CAPTIONS, 12), encoder.encode(CAPTIONS, 12))


def test_a_run_reads_stored_texts_as_it_reads_the_encoder(folders, tmp_path):
    live = DataConfig(
        "shapes", size=16, condition="caption", caption=12, encoder=str(folders["t5"])
    )
    first = Sources(live)
    data = first.data["shapes"]
    captions = data.take(torch.arange(8)).captions
    encode_texts(captions, first.encoder, tmp_path, 12, bar=False)
    second = Sources(replace(live, encoder=str(tmp_path)))
    batches = [each.take("shapes", torch.arange(8)) for each in (first, second)]
    assert torch.equal(*[batch.condition.values for batch in batches])
    assert first.inputs == second.inputs
    clip = (str(folders["clip"]),)
    third = Sources(replace(live, pooled=clip))
    condition = third.take("shapes", torch.arange(2)).condition
    assert condition.pooled.shape == (2, third.inputs.pooled) == (2, 12)
    with pytest.raises(ValueError, match="data.encoder"):
        DataConfig("shapes", condition="caption", pooled=clip)


def test_raw_states_are_not_scaled(folders, tmp_path):
    scaled = open_encoder(folders["t5"])
    raw = open_encoder(folders["t5"], raw=True)
    assert raw.scale == 1 != scaled.scale
    assert raw.fingerprint != scaled.fingerprint
    torch.testing.assert_close(
        raw.encode(CAPTIONS[:2], 12) * scaled.scale, scaled.encode(CAPTIONS[:2], 12)
    )
    encode_texts(CAPTIONS, raw, tmp_path, 12, bar=False)
    with pytest.raises(ValueError, match="set data.raw_texts to True"):
        open_encoder(tmp_path)
    stored = open_encoder(tmp_path, raw=True)
    assert torch.equal(stored.encode(["new"], 12), raw.encode(["new"], 12))
    config = DataConfig(
        "shapes",
        condition="caption",
        caption=12,
        encoder=str(tmp_path),
        raw_texts=True,
    )
    assert Sources(config).encoder.fingerprint == raw.fingerprint
