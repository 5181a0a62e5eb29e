# ruff: noqa: N803 -- compile-time constants of Triton kernels are written in capitals
# Names inside a kernel stand for pointers and tiles, which have no Python types.
# pyright: basic
"""The Triton kernel of furthest point sampling; ``launch.py`` runs it.

One program samples one cloud and loops inside the kernel, where PyTorch would launch half a dozen
kernels for every chosen point. The distance of each point to the chosen set is kept in global
memory, which for the usual clouds means in the cache. Letters: N points.
"""

from typing import Final, no_type_check

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "farthest_point_sample"]


@triton.jit
@no_type_check
def farthest_point_sample(
    points,  # pointer to (3, B, N), contiguous: axes that a cloud lacks are zero
    nearest,  # pointer to (B, N): starts at +inf, at -1 where a point does not take part
    start,  # pointer to (B)
    chosen,  # pointer to (B, num_samples)
    num_clouds,
    num_points,
    num_samples,
    BLOCK_N: tl.constexpr,
):
    """Sample one cloud; of equally far points the lowest index wins."""
    cloud = tl.program_id(0).to(tl.int64)
    axis = num_clouds * num_points
    x = points + cloud * num_points
    y = x + axis
    z = y + axis
    nearest += cloud * num_points
    current = tl.load(start + cloud)
    tl.store(chosen + cloud * num_samples, current)
    for number in range(1, num_samples):
        center_x = tl.load(x + current)
        center_y = tl.load(y + current)
        center_z = tl.load(z + current)
        best = center_x * 0 - 2.0  # below what any point has
        best_index = current * 0
        for first in range(0, num_points, BLOCK_N):
            index = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            exists = index < num_points
            difference_x = tl.load(x + index, mask=exists, other=0.0) - center_x
            difference_y = tl.load(y + index, mask=exists, other=0.0) - center_y
            difference_z = tl.load(z + index, mask=exists, other=0.0) - center_z
            distance = difference_x * difference_x
            distance += difference_y * difference_y
            distance += difference_z * difference_z
            before = tl.load(nearest + index, mask=exists, other=-2.0)
            now = tl.minimum(before, distance)
            tl.store(nearest + index, now, mask=exists)
            largest = tl.max(now, axis=0)
            place = tl.min(tl.where(now == largest, index, num_points), axis=0)
            # tiles come in order, so that an equal one further on does not win
            better = largest > best
            best_index = tl.where(better, place.to(tl.int64), best_index)
            best = tl.where(better, largest, best)
        current = best_index
        tl.store(chosen + cloud * num_samples + number, current)


#: whether TRITON_INTERPRET was set when Triton was imported
INTERPRETED: Final = not isinstance(farthest_point_sample, triton.runtime.JITFunction)
