"""Each query alone with the gallery, through runners and feature sets."""

from __future__ import annotations

import numpy as np
import pytest

from nformer_edge.backends.open import open_model
from nformer_edge.core.errors import ArtifactError, BackendError, DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec
from nformer_edge.gallery.protocols import map_sets, relate_per_query
from nformer_edge.metrics.distance import cosine_distances, unit_rows
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.training.relate import per_query


def people(count: int, seed: int) -> Features:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(0).standard_normal((10, 32))
    pids = np.arange(count) % 10
    features = (centers[pids] + 0.7 * rng.standard_normal((count, 32))).astype(np.float32)
    return Features(features, pids + 1, np.full(count, seed), tuple(f"{seed}/{i}.jpg" for i in range(count)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints with a head of one layer, by rule."""
    import torch

    from nformer_edge.model.backbone import Backbone
    from nformer_edge.model.checkpoint import save_checkpoint
    from nformer_edge.model.gated import make_head

    folder, paths = tmp_path_factory.mktemp("heads"), {}
    for rule in ("features", "affinity", "gated", None):
        heads = 1 if rule == "gated" else 2
        head = None if rule is None else HeadSpec(32, layers=1, heads=heads, k=6, landmarks=3, rule=rule)
        spec = ModelSpec(BackboneSpec("osnet_x0_25", 32), head, PreprocessSpec(64, 32))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            paths[rule] = folder / f"{rule}.safetensors"
            save_checkpoint(paths[rule], spec, Backbone(spec.backbone), None if head is None else make_head(head))
    return paths


def test_a_query_is_ranked_as_in_a_pass_of_its_own(models):
    query, gallery = people(15, 1), people(60, 2)
    with open_model(models["features"], intra_op_threads=1) as runner:
        found = relate_per_query(runner, query, gallery, seed=4)
        landmarks = draw_landmarks(60, 1, 3, 4)
        for i, own in enumerate(query.features):
            rows = unit_rows(runner.relate(np.concatenate([gallery.features, own[None]]), landmarks))
            expected = cosine_distances(rows[-1:], rows[:-1])[0]
            np.testing.assert_allclose(found.distances[i], expected, atol=2e-6)
            np.testing.assert_allclose(unit_rows(found.query.features[i : i + 1]), rows[-1:], atol=2e-6)
        np.testing.assert_allclose(found.gallery.features, runner.relate(gallery.features, landmarks), atol=1e-5)
    assert found.exact
    assert found.changed > 0
    assert found.query.paths == query.paths


def test_sets_are_mapped_as_the_gated_head_compares_them(models):
    import torch

    query, gallery = people(15, 1), people(60, 2)
    rows = torch.from_numpy(np.concatenate([query.features, gallery.features]))
    with open_model(models["gated"], intra_op_threads=1) as runner:
        mapped = map_sets(runner, query, gallery, seed=4)
        landmarks = torch.from_numpy(draw_landmarks(75, 1, 3, 4))
        expected = runner.with_head(lambda head: head.mapped(rows, landmarks))
    assert [f.paths for f in mapped] == [query.paths, gallery.paths]
    np.testing.assert_allclose(np.concatenate([f.features for f in mapped]), expected, atol=1e-6)
    for rule in ("features", None):
        with open_model(models[rule], intra_op_threads=1) as runner:
            assert map_sets(runner, query, gallery) is None


def test_the_gated_head_answers_exactly_with_every_image_changed(models):
    query, gallery = people(4, 1), people(60, 2)
    with open_model(models["gated"], intra_op_threads=1) as runner:
        found = relate_per_query(runner, query, gallery)
    assert found.exact
    assert found.changed == 60
    assert np.isfinite(found.distances).all()


def test_under_the_affinity_rule_the_answer_says_that_it_is_not_exact(models):
    query, gallery = people(5, 1), people(60, 2)
    with open_model(models["affinity"], intra_op_threads=1) as runner:
        found = relate_per_query(runner, query, gallery)
        frozen = runner.with_head(lambda head: per_query(head, query, gallery, follow=False))
    assert not found.exact
    assert found.changed > 0
    assert (frozen.exact, frozen.changed) == (False, 0)
    both = unit_rows(frozen.query.features), unit_rows(frozen.gallery.features)
    np.testing.assert_allclose(frozen.distances, cosine_distances(*both), atol=1e-6)


def test_what_cannot_be_taken_apart_is_refused(models, tiny_bundle):
    query, gallery = people(2, 1), people(9, 2)
    with (
        open_model(tiny_bundle, intra_op_threads=1) as runner,
        pytest.raises(BackendError, match="onnxruntime runs as one"),
    ):
        relate_per_query(runner, query, gallery)
    with open_model(models[None], intra_op_threads=1) as runner, pytest.raises(UsageError, match="a backbone alone"):
        relate_per_query(runner, query, gallery)


def test_a_head_alone_relates_features_and_embeds_no_image(models, tmp_path):
    from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint

    whole = load_checkpoint(models["features"])
    save_checkpoint(tmp_path / "head.safetensors", whole.spec, None, whole.head)
    query, gallery = people(3, 1), people(20, 2)
    with open_model(tmp_path / "head.safetensors", intra_op_threads=1) as runner:
        assert relate_per_query(runner, query, gallery).distances.shape == (3, 20)
        with pytest.raises(ArtifactError, match="got a head alone, expected a backbone"):
            runner.embed(np.zeros((1, 3, 64, 32), np.float32))


def test_bad_features_are_refused_at_the_door(models):
    query, gallery = people(2, 1), people(9, 2)
    with open_model(models["features"], intra_op_threads=1) as runner:
        with pytest.raises(DataError, match="gallery: got zero images"):
            relate_per_query(runner, query, gallery.take(np.array([], int)))
        with pytest.raises(DataError, match="query features: got NaN or infinity in row 1"):
            relate_per_query(runner, query.with_features(query.features * np.array([[1], [np.nan]])), gallery)
