"""Sampling, neighbors, grouping and interpolation equal those of PCT and PointNet++."""

import pytest
import torch

from eanet.ops.points import (
    ball_query,
    farthest_point_sample,
    gather_points,
    group_differences,
    interpolate,
    nearest_neighbors,
)


def cases_of(golden_case):
    """Yield what a file of several cases states: (name, meta, tensors)."""
    tensors = golden_case.tensors()
    for name, meta in golden_case.meta["cases"].items():
        yield name, meta, golden_case_tensors(tensors, f"{name}.")


def golden_case_tensors(tensors, prefix):
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def batched(tensor, dtype):
    tensor = tensor.to(dtype)
    return tensor if tensor.ndim == 3 else tensor[None]


@pytest.mark.golden("pointcloud.geometry")
@pytest.mark.parametrize("backend", [None, "eager", "reference"])
def test_sampling(golden_case, dtype, backend):
    checked = 0
    for name, _, tensors in cases_of(golden_case):
        if "xyz" not in tensors:
            continue
        xyz = batched(tensors["xyz"], dtype)
        if "fps_reference" in tensors:  # more samples than points
            with pytest.raises(ValueError, match="num_samples"):
                farthest_point_sample(xyz, len(tensors["fps_reference"]), backend=backend)
            checked += 1
        if "fps" in tensors:
            expected = tensors["fps"].view(len(xyz), -1)
            start = tensors.get("start_idx", 0)
            found = farthest_point_sample(xyz, expected.shape[1], start=start, backend=backend)
            assert torch.equal(found, expected), name
            checked += 1
        if "fps_skip_origin" in tensors:
            expected = tensors["fps_skip_origin"][None]
            found = farthest_point_sample(xyz, expected.shape[1], min_norm2=1e-3, backend=backend)
            assert torch.equal(found, expected), name
            assert not tensors["skipped"][found[0, 1:]].any()
            checked += 1
    assert checked


@pytest.mark.golden("pointcloud.geometry")
@pytest.mark.parametrize("backend", [None, "eager", "reference"])
def test_neighbors(golden_case, dtype, backend):
    checked = 0
    for name, meta, tensors in cases_of(golden_case):
        if "knn" not in tensors:
            continue
        xyz = batched(tensors["xyz"], dtype)
        if "query" in tensors:
            query = batched(tensors["query"], dtype)
        elif "fps" in tensors:
            query = gather_points(xyz, tensors["fps"][None])
        else:
            query = xyz
        if query.shape[1] != len(tensors["knn"]):
            query = xyz
        expected, distances = tensors["knn"], tensors["knn_d2"]
        found, squared = nearest_neighbors(query, xyz, expected.shape[1], backend=backend)
        torch.testing.assert_close(squared[0].double(), distances, rtol=0, atol=1e-6, msg=name)
        if meta["knn_boundary_tie_free"]:
            assert torch.equal(found[0].sort(1).values, expected.sort(1).values), name
        checked += 1
    assert checked


@pytest.mark.golden("pointcloud.geometry")
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_balls(golden_case, dtype, backend):
    for _, meta, tensors in cases_of(golden_case):
        if "radius" not in meta:
            continue
        found = ball_query(
            batched(tensors["query"], dtype),
            batched(tensors["xyz"], dtype),
            meta["nsample"],
            meta["radius"],
            backend=backend,
        )
        assert torch.equal(found[0], tensors["idx"])


@pytest.mark.golden("pointcloud.geometry")
def test_interpolation(golden_case, dtype):
    for _, _, tensors in cases_of(golden_case):
        if "unknown" not in tensors:
            continue
        known, query, features = (
            batched(tensors[name], dtype) for name in ("known", "unknown", "features")
        )
        clear = ~tensors["ambiguous"]
        for power, name in ((2, "out_inv_d2"), (1, "out_inv_d")):
            found = interpolate(features, known, query, power=power)[0]
            rtol = 1e-9 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(
                found[clear].double(), tensors[name][clear], rtol=rtol, atol=rtol * 1e-2
            )


@pytest.mark.golden("pointcloud.sample_and_group")
def test_grouping(golden_case, dtype):
    tensors = golden_case.tensors()
    arguments = golden_case.meta["args"]
    for prefix in ("", "all."):
        if f"{prefix}xyz" not in tensors:
            continue
        xyz = tensors[f"{prefix}xyz"].to(dtype)
        points = tensors[f"{prefix}points"].to(dtype).requires_grad_()
        expected = tensors[f"{prefix}knn_idx"]
        centers = None
        query = xyz
        if f"{prefix}fps_idx" in tensors:
            centers = farthest_point_sample(xyz, arguments["npoint"])
            assert torch.equal(centers, tensors[f"{prefix}fps_idx"])
            query = gather_points(xyz, centers)
            assert torch.equal(query, tensors[f"{prefix}new_xyz"].to(dtype))
        neighbors, _ = nearest_neighbors(query, xyz, expected.shape[2])
        assert torch.equal(neighbors.sort(2).values, expected.sort(2).values)
        grouped = group_differences(points, centers, expected)
        torch.testing.assert_close(
            grouped.double(), tensors[f"{prefix}grouped"].double(), rtol=0, atol=1e-6
        )
        if f"{prefix}grad_grouped" in tensors:
            grouped.backward(tensors[f"{prefix}grad_grouped"].to(dtype))
            torch.testing.assert_close(
                points.grad.double(), tensors[f"{prefix}grad_points"].double(), rtol=0, atol=1e-5
            )
