"""Configs survive a round trip through JSON and refuse invalid settings."""

import inspect
import json
import math
import re
from dataclasses import asdict, fields, is_dataclass, replace

import pytest
import torch

from selfflow.data.options import SOUNDS, DataConfig
from selfflow.data.sources import _CODECS
from selfflow.method.backbone import Inputs
from selfflow.method.build import (
    _transformer_config,
    build_backbone,
    build_density,
    build_objective,
    build_schedule,
    check_layers,
    check_levels,
)
from selfflow.method.flow import (
    LogitNormal,
    Mixture,
    PlateauLogitNormal,
    Shifted,
    Uniform,
)
from selfflow.method.objective import (
    REPA,
    SRA,
    SRA2,
    FlowMatching,
    LayerSync,
    SelfFlow,
    ema_decay,
)
from selfflow.method.options import (
    DENSITIES,
    MASK_RATIOS,
    SCHEDULES,
    SIZES,
    ModelConfig,
    ObjectiveConfig,
    TransformerOptions,
)
from selfflow.method.schedule import (
    DiffusionForcing,
    DualTimestep,
    FullMasking,
    MultiTimestep,
    SingleLevel,
)
from selfflow.method.tokens import Part
from selfflow.method.transformer import TransformerConfig
from selfflow.registries import objectives, own_options
from selfflow.training.config import (
    PRESETS,
    Config,
    TrainConfig,
    differences,
    draft,
    overlaid,
)


def test_a_config_survives_json():
    config = Config.from_dict(
        {
            "name": "x",
            "objective": {"density": "logit_normal", "student_layer": 1},
            "training": {"lr": 0.1},
        }
    )
    assert Config.from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert config.objective.student_layer == 1
    assert config.training.steps == Config().training.steps


@pytest.mark.parametrize(
    "values, words",
    [
        ({"nam": "x"}, "unknown field in config 'nam'.*Did you mean 'name'"),
        (
            {"training": {"step": 5}},
            "unknown field in training 'step'.*Did you mean 'steps'",
        ),
        (
            {"objective": {"name": "selfflow"}},
            "unknown objective .*'selfflow'.*Did you mean 'self_flow'",
        ),
        ({"objective": {"density": "logitnormal"}}, "unknown density"),
        ({"data": {"name": "mnist"}}, "unknown data set .*'mnist'"),
        ({"objective": {"mask_ratio": 0.6}}, r"mask_ratio is 0.6, outside \[0, 0.5\]"),
        ({"objective": {"mask_ratio": -0.1}}, "mask_ratio"),
        ({"objective": {"label_drop": 1.5}}, "label_drop"),
        ({"objective": {"rep_weight": -1}}, "rep_weight"),
        ({"objective": {"rep_until": 1.5}}, "rep_until is 1.5, but a share"),
        (
            {"objective": {"rep_warmup": 0.4, "rep_until": 0.3}},
            "together are longer than rep_until 0.3",
        ),
        (
            {"objective": {"student_layer": 4, "teacher_layer": 4}},
            "student_layer 4 and teacher_layer 4",
        ),
        ({"objective": {"student_layer": 5, "teacher_layer": 2}}, "student_layer 5"),
        ({"objective": {"teacher_layer": 7}}, "depth = 6"),
        ({"training": {"steps": 0}}, "steps is 0"),
        ({"training": {"lr": float("nan")}}, "lr is nan"),
        ({"training": {"ema_half_life": 0}}, "ema_half_life is 0"),
        ({"training": {"cooldown": 1.5}}, "cooldown is 1.5"),
        ({"training": {"cooldown": -0.1}}, "cooldown is -0.1"),
        ({"training": {"warmup": 10.5}}, "warmup is 10.5, .* whole number of steps"),
        ({"training": {"warmup": 600, "cooldown": 0.5}}, "together take 1100 steps"),
        ({"training": {"cooldown": 2000}}, "more than the 1000 of the run"),
        ({"training": {"lr_schedule": "cosin"}}, "did you mean cosine|cosine"),
        (
            {"training": {"lr_schedule": "cosine", "cooldown": 0.2}},
            "lr_schedule cosine falls to 0 by itself, so cooldown 0.2 has no place",
        ),
        ({"training": {"betas": (0.9, 1.0)}}, r"betas are \(0.9, 1.0\)"),
        ({"training": {"betas": (0.9,)}}, "betas is"),
        ({"training": {"eps": 0.0}}, "eps is 0.0"),
        ({"training": {"precision": "fp8"}}, "precision"),
        ({"training": {"steps": 2.5}}, "TrainConfig.steps is 2.5, expected int"),
        ({"training": {"steps": "5"}}, "steps is '5', expected int"),
        ({"training": {"steps": True}}, "steps is True"),
        ({"objective": {"mask_ratio": "0.2"}}, "mask_ratio is '0.2', expected float"),
        ({"seed": "0"}, "seed is '0'"),
        ({"objective": {"student_layer": 1.0}}, "student_layer is 1.0"),
        ({"training": 5}, "training is 5, expected a dict of its fields"),
        ({"data": "digits"}, "data is 'digits', expected a dict of its fields"),
        ({"model": {"width": 0}}, "width is 0"),
        ({"name": " a"}, "not a valid run name"),
        ({"name": "-a"}, "not a valid run name"),
        ({"name": "a\n"}, "not a valid run name"),
        ({"name": ".hidden"}, "not a valid run name"),
        ({"name": "../x"}, "not a valid run name"),
        ({"name": "a/b"}, "not a valid run name"),
        ({"name": ""}, "not a valid run name"),
        ({"name": ".."}, "not a valid run name"),
        ({"name": "a\\b"}, "not a valid run name"),
        (
            {"model": {"size": "S", "width": 512}},
            "width is 512, but size S has 384; take model.size own",
        ),
        ({"model": {"size": "M"}}, "unknown size .*'M'; known are own, S, B, L, XL"),
        ({"model": {"positions": "rope"}}, "unknown positions"),
        ({"model": {"mlp": "swigly"}}, "Did you mean 'swiglu'"),
        ({"model": {"modulation": "token"}}, "unknown modulation"),
        ({"model": {"qk_norm": 1}}, "qk_norm is 1, expected bool"),
        ({"objective": {"density_std": 0, "density": "logit_normal"}}, "std is 0"),
        (
            {"objective": {"density_std": 2.0, "density": "plateau_logit_normal"}},
            "std is 2.0",
        ),
        (
            {"objective": {"density_mean": float("nan"), "density": "logit_normal"}},
            "nan",
        ),
        ({"objective": {"density_shift": 0}}, "density_shift is 0"),
        ({"objective": {"density_shift": float("nan")}}, "density_shift is nan"),
        ({"objective": {"noisy_share": -0.1}}, "none may be negative"),
        ({"objective": {"noisy_share": 1.5}}, "none may be negative"),
        ({"objective": {"schedule": "duel"}}, "unknown schedule .*Did you mean 'dual'"),
        ({"objective": {"order": "sorted"}}, "order is 'sorted'"),
        ({"objective": {"exact": "yes"}}, "exact is 'yes'"),
        ({"objective": {"near": 0.0}}, "near is 0.0"),
        ({"objective": {"near": "0.2"}}, "near is '0.2', expected float"),
        ({"objective": {"single_share": 1.5}}, "single_share is 1.5"),
        ({"objective": {"block": 0}}, "block"),
        (
            {"objective": {"levels": 1}},
            "levels is 1, but the dual schedule needs at least 2; schedule='single' is "
            "one",
        ),
        (
            {"objective": {"levels": 3, "exact": True}},
            "the schedule here is dual with 3",
        ),
        (
            {"objective": {"levels": 3, "schedule": "single"}},
            "the schedule here is single with 3",
        ),
        (
            {"objective": {"block": 2, "schedule": "full_masking"}},
            "the schedule here is full_masking with 2",
        ),
        (
            {"objective": {"name": "sra", "order": "cleaner"}},
            "the schedule here is single with 2",
        ),
        ({"objective": {"name": "repa", "near": 0.2}}, "the schedule here is single"),
        (
            {"objective": {"name": "flow_matching", "single_share": 0.2}},
            "the schedule here is single",
        ),
        ({"objective": {"distance": "l1"}}, "unknown distance"),
        ({"objective": {"normalise": "unit"}}, "unknown normalise"),
        (
            {"objective": {"flow_tokens": "mask"}},
            "unknown flow_tokens .*Did you mean 'masked'",
        ),
        ({"objective": {"rep_tokens": "some"}}, "unknown rep_tokens"),
        (
            {"objective": {"rep_tokens": "masked", "mask_ratio": 0.0}},
            "here none is masked: mask_ratio 0.0",
        ),
        (
            {"objective": {"flow_tokens": "masked", "single_share": 1.0}},
            "none is masked.*single_share 1.0",
        ),
        (
            {"objective": {"rep_tokens": "noisier", "schedule": "diffusion_forcing"}},
            "none is masked.*diffusion_forcing",
        ),
        (
            {"objective": {"name": "sra", "separated": True}},
            "separated is attention within noise levels.*there is one",
        ),
        (
            {"objective": {"schedule": "full_masking", "mask_ratio": 1.1}},
            "mask_ratio is 1.1",
        ),
        (
            {"objective": {"name": "flow_matching", "flow_tokens": "masked"}},
            "'masked', but with one level no token is",
        ),
        (
            {"objective": {"name": "sra", "rep_tokens": "noisier"}},
            "'noisier', but with one level no token is",
        ),
        ({"objective": {"separated": 1}}, "separated is 1, expected bool"),
        (
            {"objective": {"name": "layer_sync", "teacher_layer": 1}},
            "teacher_layer 1 do not fit",
        ),
        (
            {"objective": {"name": "repa", "student_layer": 7}},
            "student_layer is 7, but the model has layers 1 to 6",
        ),
        ({"training": {"compile": "yes"}}, "compile is 'yes'"),
        ({"training": {"checkpointing": 0}}, "checkpointing is 0"),
    ],
)
def test_bad_configs_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Config.from_dict(values)


def test_differences_are_named_by_their_path():
    a = asdict(Config())
    b = asdict(Config(name="b", objective=ObjectiveConfig(mask_ratio=0.5)))
    assert differences(a, b) == {
        "name": ("digits", "b"),
        "objective.mask_ratio": (0.25, 0.5),
    }
    assert Config.from_dict({"training": {"lr": 1}}).training.lr == 1, (
        "a whole number serves as a float"
    )
    assert differences(a, a) == {}
    assert differences({"x": 1}, {}) == {"x": (1, None)}


def test_objectives_match_their_config():
    shape = TransformerConfig.of_image(1, (2, 2), 8, depth=6, heads=2)
    plain = build_objective(
        ObjectiveConfig("flow_matching", density="logit_normal", label_drop=0.2),
        shape,
        (shape.parts,),
    )
    assert isinstance(plain, FlowMatching)
    assert plain.schedule == SingleLevel(LogitNormal())
    assert plain.label_drop == 0.2
    full = build_objective(
        ObjectiveConfig("self_flow", mask_ratio=0.4, rep_weight=0.3, teacher_layer=5),
        shape,
        (shape.parts,),
    )
    assert isinstance(full, SelfFlow)
    assert full.schedule == DualTimestep(mask_ratio=0.4, grid=(2, 2))
    assert (full.student_layer, full.teacher_layer, full.rep_weight) == (2, 5, 0.3)


@pytest.mark.parametrize(
    "name, weight",
    [
        ("self_flow", 0.8),
        ("sra", 0.8),
        ("layer_sync", 0.2),
        ("repa", 0.5),
        ("sra2", 0.5),
        ("self_transcendence", 0.5),
    ],
)
def test_the_weight_of_the_representation_loss_is_the_published_one(name, weight):
    assert ObjectiveConfig(name).rep_weight == weight
    assert ObjectiveConfig(name, rep_weight=0.0).rep_weight == 0.0
    assert (
        build_objective(ObjectiveConfig(name), SHAPE, (SHAPE.parts,)).rep_weight
        == weight
    )


SHAPE = TransformerConfig.of_image(4, (4, 6), 16, depth=6, heads=2)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, Uniform()),
        (
            {"density": "logit_normal", "density_mean": 1, "density_std": 0.5},
            LogitNormal(1, 0.5),
        ),
        (
            {"density": "plateau_logit_normal", "density_mean": 2.3},
            PlateauLogitNormal(2.3, 1.0),
        ),
        ({"density_shift": 4.63}, Shifted(Uniform(), 4.63)),
        ({"noisy_share": 0.05}, Mixture((Uniform(), Uniform(0.95, 1.0)), (0.95, 0.05))),
        (
            {"density": "logit_normal", "density_shift": 2.95, "noisy_share": 0.05},
            Mixture((LogitNormal(math.log(2.95)), Uniform(0.95, 1.0)), (0.95, 0.05)),
        ),
        # the plateau stays one
        (
            {"density": "plateau_logit_normal", "density_shift": 10},
            PlateauLogitNormal(math.log(10)),
        ),
    ],
)
def test_densities_match_their_config(values, expected):
    assert build_density(ObjectiveConfig(**values)) == expected
    assert build_schedule(ObjectiveConfig("flow_matching", **values)) == SingleLevel(
        expected
    )


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, DualTimestep(grid=(4, 6))),
        ({"name": "flow_matching"}, SingleLevel()),
        ({"name": "sra"}, SingleLevel()),
        ({"name": "layer_sync"}, SingleLevel()),
        ({"name": "repa"}, SingleLevel()),
        ({"schedule": "single"}, SingleLevel()),
        (
            {"name": "sra", "schedule": "dual", "mask_ratio": 0.1},
            DualTimestep(mask_ratio=0.1, grid=(4, 6)),
        ),
        (
            {
                "order": "cleaner",
                "exact": True,
                "near": 0.2,
                "block": 2,
                "single_share": 0.25,
                "mask_ratio": 0.5,
            },
            DualTimestep(Uniform(), 0.5, "cleaner", True, 0.2, 2, (4, 6), 0.25),
        ),
        # a whole number serves as a float
        ({"near": 1}, DualTimestep(near=1, grid=(4, 6))),
        ({"levels": 3, "mask_ratio": 0.5}, MultiTimestep(Uniform(), (0.5, 0.25, 0.25))),
        (
            {"levels": 5, "mask_ratio": 0.4},
            MultiTimestep(Uniform(), (0.6, 0.1, 0.1, 0.1, 0.1)),
        ),
        ({"schedule": "diffusion_forcing"}, DiffusionForcing()),
        ({"schedule": "full_masking", "mask_ratio": 0.3}, FullMasking(Uniform(), 0.3)),
    ],
)
def test_schedules_match_their_config(values, expected):
    config = ObjectiveConfig(**values)
    built = build_schedule(config, (Part("image", 1, (1, 4, 6)),))
    assert type(built) is type(expected)
    assert vars(built) == vars(expected)
    assert vars(build_objective(config, SHAPE, (SHAPE.parts,), 3).schedule) == vars(
        expected
    )


def test_a_block_that_does_not_divide_the_grid_is_refused_where_the_grid_is_known():
    config = Config(objective=ObjectiveConfig(block=5))
    with pytest.raises(ValueError, match=r"block 5 does not divide grid \(4, 6\)"):
        build_objective(config.objective, SHAPE, (SHAPE.parts,))


@pytest.mark.parametrize(
    "name, kind, weight",
    [
        ("self_flow", SelfFlow, 0.8),
        ("sra", SRA, 0.8),
        ("layer_sync", LayerSync, 0.2),
        ("repa", REPA, 0.5),
        ("sra2", SRA2, 0.5),
        ("self_transcendence", SRA2, 0.5),
    ],
)
def test_every_switch_reaches_the_objective(name, kind, weight):
    layers = (
        {"student_layer": 1}
        if kind in (REPA, SRA2)
        else {"student_layer": 1, "teacher_layer": 6}
    )
    config = ObjectiveConfig(
        name,
        schedule="dual",
        rep_weight=weight,
        label_drop=0.3,
        separated=True,
        flow_tokens="noisier",
        rep_tokens="masked",
        distance="l2",
        normalise="centred",
        rep_warmup=0.02,
        rep_decay=0.03,
        rep_until=0.2,
        **layers,
    )
    objective = build_objective(config, SHAPE, (SHAPE.parts,), 3)
    assert type(objective) is kind
    for field, value in {
        "student_layer": 1,
        "rep_weight": weight,
        "label_drop": 0.3,
        "separated": True,
        "flow_tokens": "noisier",
        "rep_tokens": "masked",
        "distance": "l2",
        "normalise": "centred",
        "rep_warmup": 0.02,
        "rep_decay": 0.03,
        "rep_until": 0.2,
        **layers,
    }.items():
        assert getattr(objective, field) == value, field
    if name == "repa":
        assert objective.projector[-1].out_features == 3


def test_options_of_other_objectives_are_refused():
    with pytest.raises(
        ValueError,
        match="rep_tokens is an option of objective self_flow, .*, which flow_matching "
        "does not",
    ):
        ObjectiveConfig("flow_matching", rep_tokens="masked")
    assert replace(
        ObjectiveConfig("sra", label_drop=0.3), name="repa"
    ) == ObjectiveConfig("repa", label_drop=0.3)
    with pytest.raises(
        ValueError,
        match="offset is an option of objective sra, which self_flow does not have",
    ):
        replace(ObjectiveConfig("sra", offset=0.1), name="self_flow")
    assert (
        ObjectiveConfig(
            "flow_matching", schedule="dual", flow_tokens="masked"
        ).flow_tokens
        == "masked"
    )


@pytest.mark.parametrize(
    "size, numbers",
    [
        ("S", (384, 12, 6)),
        ("B", (768, 12, 12)),
        ("L", (1024, 24, 16)),
        ("XL", (1152, 28, 16)),
    ],
)
def test_a_size_sets_width_depth_and_heads(size, numbers):
    config = ModelConfig(size=size, width=96)
    assert (config.width, config.depth, config.heads) == numbers
    assert ModelConfig(**asdict(config)) == config
    shape = _transformer_config(
        Inputs((Part("image", 16, (1, 16, 16)),), 1000), **own_options(config)
    )
    assert shape == TransformerConfig.of_size(
        size, (Part("image", 16, (1, 16, 16)),), classes=1000
    )
    assert (
        Config(
            model=config,
            objective=ObjectiveConfig("layer_sync", teacher_layer=numbers[1]),
        ).model.size
        == size
    )


def test_variants_reach_the_transformer():
    config = ModelConfig(
        width=64,
        depth=2,
        heads=4,
        mlp_ratio=3.0,
        positions="rotary",
        mlp="swiglu",
        qk_norm=True,
        modulation="shared",
    )
    expected = TransformerConfig.of_image(
        channels=4,
        grid=(4, 6),
        width=64,
        depth=2,
        heads=4,
        mlp_ratio=3.0,
        classes=3,
        positions="rotary",
        mlp="swiglu",
        qk_norm=True,
        modulation="shared",
    )
    inputs = Inputs((Part("image", 4, (1, 4, 6)),), 3)
    assert (
        _transformer_config(inputs, **own_options(config))
        == build_backbone(config, inputs).config
        == expected
    )
    with pytest.raises(ValueError, match=r"width 96 .* 64 would be"):
        build_backbone(ModelConfig(width=96, heads=8, positions="rotary"), inputs)


def test_every_name_makes_a_config_that_goes_to_json_and_back():
    for name in objectives:
        for schedule in SCHEDULES:
            for density in DENSITIES:
                config = Config(
                    objective=ObjectiveConfig(name, density, schedule=schedule)
                )
                assert (
                    Config.from_dict(json.loads(json.dumps(asdict(config)))) == config
                )


def test_a_config_draws_no_random_numbers_and_makes_no_weights():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for name in objectives:
        Config(objective=ObjectiveConfig(name, density="logit_normal"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("ratio", [None, *MASK_RATIOS.values()])
def test_defaults_that_skip_the_check_fit_at_every_depth(ratio):
    usual = ObjectiveConfig(mask_ratio=ratio, rep_weight=0.3, label_drop=0.5)
    assert usual.usual
    assert not replace(usual, near=0.5).usual
    assert ObjectiveConfig("flow_matching").usual
    check_levels(usual)
    for depth in range(2, 40):
        check_layers(usual, depth, set())
    with pytest.raises(ValueError, match="teacher_layer 2 do not fit"):
        Config(model=ModelConfig(depth=1))


def test_codecs_and_their_names_are_the_same():
    assert SOUNDS == tuple(_CODECS)


def test_configs_are_plain_values():
    for part in (Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig):
        assert part() == part()
        assert hash(part()) == hash(part())
        with pytest.raises(AttributeError):
            setattr(part(), fields(part)[0].name, 1)


def test_presets_are_the_published_settings():
    published = {name: PRESETS[name] for name in SIZES}
    for name, preset in published.items():
        model = preset.model
        training = preset.training
        objective = preset.objective
        assert (model.width, model.depth, model.heads) == SIZES[name]
        assert model.mlp_ratio == 4
        assert preset.data.patch == 2
        numbers = (
            training.lr,
            training.weight_decay,
            training.batch,
            training.clip,
            training.precision,
        )
        assert numbers == (1e-4, 0, 256, 1, "bf16")
        assert (objective.name, objective.mask_ratio, objective.rep_weight) == (
            "self_flow",
            0.25,
            0.8,
        )
        assert ema_decay(training.ema_half_life * training.steps) == pytest.approx(
            0.9999, abs=1e-12
        )
    assert published["XL"].training.steps == 4_000_000
    parts = (Part("image", 16, (1, 16, 16)),)
    layers = build_objective(PRESETS["XL"].objective, PRESETS["XL"].model, (parts,))
    assert (layers.student_layer, layers.teacher_layer) == (8, 20)
    assert PRESETS["digits"] == Config()
    assert list(PRESETS) == [
        "digits",
        "digits-small",
        "shapes",
        "flux2-small",
        "emblems",
        "motion",
        "notes",
        "scenes",
        *SIZES,
    ]


def test_presets_are_made_again_from_their_explicit_settings_and_from_json():
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert Config.from_dict(preset.explicit()) == preset
        assert Config.from_dict(json.loads(json.dumps(asdict(preset)))) == preset


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"objective": {"name": "repa", "student_layer": 3}},
        {"model": {"size": "B"}},
        {"training": {"batch": 100}},
        {"seed": 3, "data": {"patch": 4}},
        {"training": {"accumulate": 16}},
        {"objective": {"rep_tokens": "masked", "near": 0.2}, "name": "x"},
        {"model": {"width": 64, "heads": 8}},
    ],
)
def test_explicit_settings_are_those_that_were_given(values):
    config = Config.from_dict(values)
    assert config.explicit() == values
    assert Config.from_dict(config.explicit()) == config


def test_settings_override_each_other():
    below = {"name": "a", "training": {"lr": 1.0, "steps": 3}}
    assert overlaid(below, {"training": {"lr": 2.0}, "seed": 1}) == {
        "name": "a",
        "training": {"lr": 2.0, "steps": 3},
        "seed": 1,
    }
    assert below == {"name": "a", "training": {"lr": 1.0, "steps": 3}}, (
        "nothing is changed in place"
    )


def test_a_draft_leaves_dependent_settings_open():
    start = draft({"training": {"batch": 24}, "model": {"size": "S"}})
    assert start.training.shards is None
    assert start.objective.mask_ratio is None
    assert start.model.width == ModelConfig().width
    finished = replace(
        start,
        objective=replace(start.objective, name="repa"),
        model=replace(start.model, size="B"),
    )
    assert finished.objective.rep_weight == 0.5
    assert finished.model.width == 768
    assert {f.name for f in fields(start)} == set(vars(start)), "every field is there"
    with pytest.raises(ValueError, match="unknown field in training 'lerning_rate'"):
        draft({"training": {"lerning_rate": 1}})
    with pytest.raises(ValueError, match="outside"):
        draft({"objective": {"mask_ratio": 0.9}})


def test_every_field_has_a_comment():
    for part in (
        Config,
        DataConfig,
        ModelConfig,
        TransformerOptions,
        ObjectiveConfig,
        TrainConfig,
    ):
        source = inspect.getsource(part)
        inline = re.findall(r"^    (\w+): .+?  # .{4}", source, re.M)
        above = re.findall(r"^    # .{4,}\n    (\w+):", source, re.M)
        options = {f.name for f in fields(part) if not is_dataclass(f.default_factory)}
        assert options and options <= {*inline, *above}, part
