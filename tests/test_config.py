"""Configs: there and back, and what they refuse."""
import json
from dataclasses import asdict

import pytest

from selfflow.config import Config, ObjectiveConfig, build_objective, differences
from selfflow.flow import LogitNormal
from selfflow.objective import FlowMatching, SelfFlow
from selfflow.schedule import DualTimestep, SingleLevel
from selfflow.transformer import TransformerConfig


def test_json_and_back():
    config = Config.from_dict({"name": "x", "objective": {"density": "logit_normal", "student_layer": 1},
                               "training": {"lr": 0.1}})
    assert Config.from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert config.objective.student_layer == 1 and config.training.steps == Config().training.steps


@pytest.mark.parametrize("values, words", [
    ({"nam": "x"}, "unknown field in config 'nam'.*Did you mean 'name'"),
    ({"training": {"step": 5}}, "unknown field in training 'step'.*Did you mean 'steps'"),
    ({"objective": {"name": "selfflow"}}, "unknown objective .*'selfflow'.*Did you mean 'self_flow'"),
    ({"objective": {"density": "logitnormal"}}, "unknown density"),
    ({"data": {"name": "mnist"}}, "unknown data set .*'mnist'"),
    ({"objective": {"mask_ratio": 0.6}}, r"mask_ratio is 0.6, outside \[0, 0.5\]"),
    ({"objective": {"mask_ratio": -0.1}}, "mask_ratio"),
    ({"objective": {"label_drop": 1.5}}, "label_drop"),
    ({"objective": {"rep_weight": -1}}, "rep_weight"),
    ({"objective": {"student_layer": 4, "teacher_layer": 4}}, "student_layer 4 and teacher_layer 4"),
    ({"objective": {"student_layer": 5, "teacher_layer": 2}}, "student_layer 5"),
    ({"objective": {"teacher_layer": 7}}, "depth = 6"),
    ({"training": {"steps": 0}}, "steps is 0"),
    ({"training": {"lr": float("nan")}}, "lr is nan"),
    ({"training": {"ema_half_life": 0}}, "ema_half_life is 0"),
    ({"training": {"precision": "fp8"}}, "precision"),
    ({"training": {"steps": 2.5}}, "TrainConfig.steps is 2.5, expected int"),
    ({"training": {"steps": "5"}}, "steps is '5', expected int"), ({"training": {"steps": True}}, "steps is True"),
    ({"objective": {"mask_ratio": "0.2"}}, "mask_ratio is '0.2', expected float"), ({"seed": "0"}, "seed is '0'"),
    ({"objective": {"student_layer": 1.0}}, "student_layer is 1.0"), ({"training": 5}, "training is 5, expected its fields"),
    ({"data": "digits"}, "data is 'digits', expected its fields"), ({"model": {"width": 0}}, "width is 0"),
    ({"name": "a b"}, "no name"), ({"name": "a\n"}, "no name"), ({"name": ".hidden"}, "no name"),
    ({"name": "../x"}, "no name for a run"), ({"name": "a/b"}, "no name"), ({"name": ""}, "no name"),
    ({"name": ".."}, "no name"),
    ({"name": "a\\b"}, "no name"),
])
def test_bad_configs_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Config.from_dict(values)


def test_differences_are_named_by_their_path():
    a, b = asdict(Config()), asdict(Config(name="b", objective=ObjectiveConfig(mask_ratio=0.5)))
    assert differences(a, b) == {"name": ("digits", "b"), "objective.mask_ratio": (0.25, 0.5)}
    assert Config.from_dict({"training": {"lr": 1}}).training.lr == 1, "a whole number serves as a float"
    assert differences(a, a) == {} and differences({"x": 1}, {}) == {"x": (1, None)}


def test_objectives_are_what_their_config_says():
    shape = TransformerConfig(1, (2, 2), 8, depth=6, heads=2)
    plain = build_objective(ObjectiveConfig("flow_matching", density="logit_normal", label_drop=0.2), shape)
    assert isinstance(plain, FlowMatching) and plain.schedule == SingleLevel(LogitNormal()) and plain.label_drop == 0.2
    full = build_objective(ObjectiveConfig("self_flow", mask_ratio=0.4, rep_weight=0.3, teacher_layer=5), shape)
    assert isinstance(full, SelfFlow) and full.schedule == DualTimestep(mask_ratio=0.4)
    assert (full.student_layer, full.teacher_layer, full.rep_weight) == (2, 5, 0.3)
