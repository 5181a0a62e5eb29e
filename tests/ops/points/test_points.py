"""Backends agree with the definitions; bad arguments are answered; operators are registered."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eanet.ops.points import (
    ball_query,
    custom_op,
    eager,
    farthest_point_sample,
    gather_points,
    interpolate,
    nearest_neighbors,
    reference,
)


def clouds(batch=3, points=70, dimensions=3, dtype=torch.float64):
    return torch.randn(batch, points, dimensions, dtype=dtype)


def some_mask(points):
    mask = torch.rand(points.shape[:2]) < 0.7
    mask[:, 5] = True
    mask[0, 0] = False
    return mask


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_eager_samples_as_defined(dimensions, masked):
    points = clouds(dimensions=dimensions)
    mask = some_mask(points) if masked else None
    found, expected = (
        farthest_point_sample(points, 20, mask=mask, backend=name)
        for name in ("eager", "reference")
    )
    assert torch.equal(found, expected)
    if mask is not None:
        assert mask.gather(1, found).all()


def test_an_exhausted_cloud_returns_its_first_point():
    points = clouds(1, 4).repeat(1, 3, 1)
    found = farthest_point_sample(points, 8)[0]
    assert sorted(found[:4].tolist()) == [0, 1, 2, 3]
    assert found[4:].tolist() == [0, 0, 0, 0]


def test_samples_cover_better_than_the_first_points():
    points = clouds(1, 500)
    chosen = gather_points(points, farthest_point_sample(points, 40))
    worst = torch.cdist(points, chosen).amin(2).max()
    assert worst < 0.7 * torch.cdist(points, points[:, :40]).amin(2).max()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("search", [eager.neighbors_by_tree, eager.neighbors_by_distance])
def test_searches_find_the_nearest(search, masked):
    points, queries = clouds(), clouds(points=9)
    mask = some_mask(points) if masked else None
    indices, squared = search(queries, points, 6, mask)
    expected, distances = reference.nearest_neighbors(queries, points, 6, mask)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(squared, distances)


@pytest.mark.parametrize("search", [eager.neighbors_by_tree, eager.neighbors_by_distance])
def test_too_few_neighbors_repeat_the_nearest(search):
    points = clouds(1, 6)
    mask = torch.tensor([[True, False, True, False, False, False]])
    indices, squared = search(points[:, :1], points, 4, mask)
    assert indices[0, 0].tolist() == [0, 2, 0, 0]
    assert squared[0, 0, 2:].tolist() == [0, 0]


def test_neighbors_are_right_away_from_the_origin():
    points = torch.rand(1, 300, 3, dtype=torch.float32) + 1000
    found, _ = eager.neighbors_by_distance(points, points, 8, None)
    exact, _ = reference.nearest_neighbors(points.double(), points.double(), 8, None)
    assert torch.equal(found.sort(2).values, exact.sort(2).values)
    # the usual form |a|^2 + |b|^2 - 2ab is not
    norms = points.square().sum(2)
    expanded = norms[:, :, None] + norms[:, None] - 2 * points @ points.transpose(1, 2)
    wrong = expanded.topk(8, largest=False).indices
    assert not torch.equal(wrong.sort(2).values, exact.sort(2).values)


def test_tiles_make_no_difference(monkeypatch):
    points = clouds(4, 50)
    whole = eager.neighbors_by_distance(points, points, 5, None)
    monkeypatch.setattr(eager, "_TILE_ON_CPU", 120)
    for found, expected in zip(
        eager.neighbors_by_distance(points, points, 5, None), whole, strict=True
    ):
        assert torch.equal(found, expected)


def test_an_empty_ball_takes_the_nearest_point():
    points = clouds(2, 40)
    queries = points[:, :3] + 100
    for backend in ("eager", "reference"):
        found = ball_query(queries, points, 4, 0.5, backend=backend)
        nearest = nearest_neighbors(queries, points, 1)[0]
        assert torch.equal(found, nearest.expand(-1, -1, 4))


def test_balls_agree():
    points = clouds(2, 60)
    found, expected = (
        ball_query(points, points, 7, 0.9, backend=name) for name in ("eager", "reference")
    )
    assert torch.equal(found, expected)


def test_interpolation_has_gradients():
    features = clouds(2, 10, 4).requires_grad_()
    known, queries = clouds(2, 10), clouds(2, 7)
    assert torch.autograd.gradcheck(lambda x: interpolate(x, known, queries), features)


def test_autocast_does_not_reach_in():
    points = clouds(2, 200, dtype=torch.float32)
    expected = farthest_point_sample(points, 50), *nearest_neighbors(points, points, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = farthest_point_sample(points, 50), *nearest_neighbors(points, points, 4)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_operators_are_registered_properly():
    points = clouds(2, 30)
    start = torch.zeros(2, dtype=torch.int64)
    mask = torch.ones(2, 30, dtype=torch.bool)
    torch.library.opcheck(custom_op.farthest_point_sample, (points, 8, start, None))
    torch.library.opcheck(custom_op.farthest_point_sample, (points, 8, start, mask))
    torch.library.opcheck(custom_op.nearest_neighbors, (points, points, 4, mask))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: farthest_point_sample(x, 31), "num_samples must be within 1..30"),
        (lambda x: farthest_point_sample(x, 4, start=30), "start must be within 0..29"),
        (lambda x: farthest_point_sample(x, 4, backend="cuda"), "backend"),
        (lambda x: farthest_point_sample(x, 4, mask=torch.ones(2, 30)), "mask must be boolean"),
        (lambda x: farthest_point_sample(x.long(), 4), "floating point"),
        (lambda x: farthest_point_sample(x[0], 4), "points must be"),
        (lambda x: nearest_neighbors(x, x, 31), "num_neighbors must be within 1..30"),
        (lambda x: nearest_neighbors(x[:1], x, 3), "differ in batch"),
        (lambda x: nearest_neighbors(x.float(), x, 3), "queries are torch.float32"),
        (lambda x: ball_query(x, x, 3, -1.0), "radius"),
        (lambda x: interpolate(x, x, x, power=3), "power must be 1 or 2"),
        (lambda x: farthest_point_sample(x, 4, backend="triton"), "triton"),
    ],
)
def test_bad_arguments(call, message, monkeypatch):
    from jaxtyping import config

    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        call(clouds(2, 30))


INTERPRETED = """
import torch
from eanet.ops.points import farthest_point_sample, kernels
assert kernels.INTERPRETED
torch.manual_seed(0)
for batch, points, dimensions, samples in ((2, 50, 3, 8), (1, 2100, 3, 3), (2, 17, 2, 17)):
    cloud = (torch.randn(batch, points, dimensions) * 64).round() / 64
    cloud[:, 3] = cloud[:, 1]
    mask = torch.rand(batch, points) < 0.6
    mask[:, 2] = True
    for chosen in (None, mask):
        for dtype in (torch.float32, torch.float64):
            found, expected = (
                farthest_point_sample(cloud.to(dtype), samples, mask=chosen, backend=name)
                for name in ("triton", "reference")
            )
            assert torch.equal(found, expected), (batch, points, dtype)
same = torch.zeros(1, 9, 3)
assert farthest_point_sample(same, 4, backend="triton").tolist() == [[0, 0, 0, 0]]
print("equal")
"""


def test_interpreted_kernel_equals_the_definition():
    pytest.importorskip("triton")
    outcome = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert outcome.stdout.strip() == "equal", outcome.stderr


@pytest.mark.gpu
def test_kernel_equals_the_definition_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    points = clouds(4, 3000, dtype=torch.float32)
    found = farthest_point_sample(points.cuda(), 300)
    assert torch.equal(found.cpu(), farthest_point_sample(points, 300))
