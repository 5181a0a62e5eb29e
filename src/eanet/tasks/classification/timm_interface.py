"""What timm's tools ask of a classifier beside ``forward_features`` and ``forward_head``."""

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from eanet.tasks.classification.positions import SinusoidPositions

__all__ = ["Pool", "TimmInterface"]

Pool = Literal["cls", "avg", "none"]


class TimmInterface(nn.Module):
    """Features of chosen blocks, another head, groups of parameters.

    A subclass owns the modules and values named below and embeds images.
    """

    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    positions: SinusoidPositions
    class_token: nn.Parameter | None
    pool: Pool
    num_classes: int
    num_features: int
    num_prefix_tokens: int
    initialization: Literal["published", "fan_in"]
    grad_checkpointing: bool

    def _embed(
        self,
        images: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> tuple[
        Float[Tensor, "batch tokens width"],
        tuple[int, int],
        Bool[Tensor, "batch tokens"] | None,
    ]:
        """Return what the first block reads, the grid of patches, and which tokens take part."""
        raise NotImplementedError

    def _run(
        self,
        block: nn.Module,
        tokens: Float[Tensor, "batch tokens width"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Apply a block."""
        raise NotImplementedError

    def forward_intermediates(
        self,
        images: Float[Tensor, "batch channels height width"],
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the patch tokens after some blocks.

        Args:
            images: normalized values.
            indices: of the blocks, negative ones from the end; a number takes the last so many,
                ``None`` all.
            return_prefix_tokens: pair each result with the class token (batch, 1, width).
            norm: apply the last norm to each.
            stop_early: run no block after the last that is asked for.
            output_fmt: ``"NCHW"`` (batch, width, rows, columns) or ``"NLC"`` (batch, patches,
                width).
            intermediates_only: leave out the tokens after the last norm.

        Returns:
            The results in the order of the blocks; without ``intermediates_only`` the pair
            (tokens after the last norm, results).

        Raises:
            ValueError: a block or a format that does not exist.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        taken = self._block_numbers(indices)
        blocks = self.blocks[: max(taken) + 1] if stop_early else self.blocks
        tokens, grid, _ = self._embed(images)
        results: list[Any] = []
        for number, block in enumerate(blocks):
            tokens = self._run(block, tokens)
            if number not in taken:
                continue
            prefix, patches = (self.norm(tokens) if norm else tokens).tensor_split(
                [self.num_prefix_tokens], dim=1
            )
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
            results.append((patches, prefix) if return_prefix_tokens else patches)
        return results if intermediates_only else (self.norm(tokens), results)

    def _block_numbers(self, indices: int | Sequence[int] | None) -> list[int]:
        """Return the numbers of blocks that ``indices`` stands for, see above."""
        depth = len(self.blocks)
        if indices is None:
            return list(range(depth))
        asked = range(depth - indices, depth) if isinstance(indices, int) else indices
        numbers = [index + depth if index < 0 else index for index in asked]
        if not numbers or not all(0 <= number < depth for number in numbers):
            raise ValueError(f"indices must be blocks within 0..{depth - 1}, got {indices}")
        return numbers

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what :meth:`forward_intermediates` of some blocks does not run.

        Args:
            indices: of the blocks, as there.
            prune_norm: whether the last norm goes too.
            prune_head: whether the classifier goes.

        Returns:
            The numbers of the blocks.
        """
        taken = self._block_numbers(indices)
        self.blocks = self.blocks[: max(taken) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "none")
        return taken

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a fresh one.

        Args:
            num_classes: its outputs; 0 leaves it out.
            global_pool: what it reads from now on: a value of ``pool``, or timm's names
                ``"token"`` and ``""``; ``None`` changes nothing.

        Raises:
            ValueError: a number below 0, an unknown pool, or a class token that is not there.
        """
        pool = {None: self.pool, "token": "cls", "": "none"}.get(global_pool, global_pool)
        if pool not in ("cls", "avg", "none"):
            raise ValueError(f"global_pool must be 'cls', 'avg' or 'none', got {global_pool!r}")
        if pool == "cls" and self.class_token is None:
            raise ValueError("global_pool='cls' needs a class token; this network has none")
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        self.num_classes, self.pool = num_classes, pool
        table = self.positions.table
        self.head = (
            nn.Linear(self.num_features, num_classes, device=table.device, dtype=table.dtype)
            if num_classes
            else nn.Identity()
        )
        if isinstance(self.head, nn.Linear):
            by_inputs = self.initialization == "fan_in"
            nn.init.trunc_normal_(
                self.head.weight, std=self.num_features**-0.5 if by_inputs else 0.02
            )
            nn.init.zeros_(self.head.bias)
        config = getattr(self, "config", None)
        if isinstance(config, dict):  # so that a saved folder builds this network again
            config["arguments"] |= {
                "num_classes": num_classes,
                "pool": pool,
                "class_token": self.class_token is not None,
            }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Choose whether training computes the blocks twice instead of keeping their activations.

        Raises:
            ValueError: the network has batch norms, whose statistics would count a batch twice.
        """
        if enable and any(isinstance(module, nn.BatchNorm1d) for module in self.modules()):
            raise ValueError("gradient checkpointing would count every batch twice in batch norms")
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that are not decayed beside vectors."""
        return {"class_token", "positions.table"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that sort parameters by depth, for learning rates by layer."""
        del coarse
        return {
            "stem": r"^(?:class_token|positions|stem)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }
