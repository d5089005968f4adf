"""One frozen dataclass is schema, command line and Python arguments at once."""

from __future__ import annotations

import json

import pytest

from nformer_edge.core.errors import Error, GateError, UsageError
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec, from_dict, to_dict


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(),
        ModelSpec(BackboneSpec("osnet_x0_25", 512, "fc"), HeadSpec(512, rule="affinity", input_scale="sqrt_dim")),
        ModelSpec(preprocess=PreprocessSpec(128, 64, channels="BGR", mean=(0.5, 0.5, 0.5))),
    ],
)
def test_a_spec_survives_json(spec: ModelSpec) -> None:
    assert from_dict(ModelSpec, json.loads(json.dumps(to_dict(spec)))) == spec


def test_a_misspelt_key_is_named_with_the_nearest_one() -> None:
    with pytest.raises(UsageError, match=r"HeadSpec key: got 'landmark'.*Did you mean 'landmarks'\?"):
        from_dict(HeadSpec, {"landmark": 5})


def test_a_misspelt_choice_is_named_with_the_nearest_one() -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'resnet50'\?"):
        from_dict(ModelSpec, {"backbone": {"arch": "resnet-50"}})


@pytest.mark.parametrize(
    "data",
    [
        {"layers": "4"}, {"layers": True}, {"layers": 4.0}, {"heads": 3}, {"k": 0}, {"rule": 1}, 7,
        {"features": -256}, {"input_scale": None},
    ],
)  # fmt: skip
def test_values_that_cannot_be_used_are_refused(data: object) -> None:
    with pytest.raises(UsageError):
        from_dict(HeadSpec, data)


@pytest.mark.parametrize("data", [{"std": [0.2, 0.2, 0.0]}, {"mean": [0.5]}, {"height": 0}, {"channels": "GBR"}])
def test_preprocessing_that_cannot_be_used_is_refused(data: object) -> None:
    with pytest.raises(UsageError):
        from_dict(PreprocessSpec, data)


def test_head_and_backbone_must_agree_on_features() -> None:
    with pytest.raises(UsageError, match=r"head\.features: got 256, expected the backbone's 512"):
        ModelSpec(BackboneSpec(features=512), HeadSpec(features=256))


def test_an_error_says_got_expected_and_how_to_mend() -> None:
    error = Error("neighbors", "shape (256, 20)", "[H=2, N=256, K]", "Add the head axis.")
    assert str(error) == "neighbors: got shape (256, 20), expected [H=2, N=256, K]. Add the head axis."


def test_gates_leave_by_another_exit_code_than_bad_input() -> None:
    assert (GateError.exit_code, UsageError.exit_code) == (1, 2)


@pytest.mark.parametrize("name", ["features", "layers", "heads", "k", "landmarks"])
def test_a_head_too_large_to_be_meant_is_refused_before_anything_is_allocated(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: got 1000000000, expected at most"):
        HeadSpec(**{name: 10**9})


def test_a_preprocessing_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UsageError, match="finite"):
        PreprocessSpec(mean=(float("nan"), 0.0, 0.0))
    with pytest.raises(UsageError, match="at most"):
        PreprocessSpec(height=10**6)
