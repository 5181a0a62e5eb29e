"""T2T-ViT, EAMLP and MLP step by step, as the paper and the authors' code run them.

The networks of :mod:`eanet.tasks.classification.t2t_vit` compute the same in fewer and cheaper
steps. Here every patch is formed, every product is carried out where the equations have it, and
the double normalization is a softmax over tokens, which do not lie together in memory, then a
division by the sum over slots (Eq. 10-14 and Algorithm 1, arXiv 2105.02358; T2T-ViT:
arXiv 2101.11986). Parameters are those of the network that is shown this way.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PaperNetwork", "has_paper_form"]


def has_paper_form(network: nn.Module) -> bool:
    """Tell whether a network is one that :class:`PaperNetwork` can show."""
    kinds = {"ea", "performer", "transformer"}
    return (
        getattr(network, "stem_kind", None) in kinds
        and getattr(network, "mixer", None) in {"self", "external"}
        and not any(type(module).__name__.startswith("Fused") for module in network.modules())
    )


class PaperNetwork(nn.Module):
    """A network step by step; it shares the parameters of one of ours.

    Args:
        network: a ``T2TViT`` for which :func:`has_paper_form` holds.

    Raises:
        ValueError: another network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not has_paper_form(network):
            raise ValueError(f"{type(network).__name__} has no form in the paper")
        self.network: Any = network

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, classes) of images (batch, channels, height, width)."""
        network, picture = self.network, images
        for split, block in zip(network.stem.splits[:-1], network.stem.blocks, strict=True):
            grid = split.grid(*picture.shape[2:])
            tokens = _token_block(block, split(picture), network.stem_kind)
            picture = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
        split = network.stem.splits[-1]
        grid = split.grid(*picture.shape[2:])
        tokens = network.stem.projection(split(picture))
        if network.class_token is not None:
            tokens = torch.cat([network.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = network.dropout(network.positions(tokens, grid, None))
        mix = _multi_head if network.mixer == "external" else _self_attention
        for block in network.blocks:
            tokens = tokens + block.drop_path(mix(block.attention, block.norm1(tokens)))
            tokens = tokens + block.drop_path(block.mlp(block.norm2(tokens)))
        return network.forward_head(network.norm(tokens))


def _token_block(block: Any, patches: Tensor, stem: str) -> Tensor:
    """Return the narrowed tokens of one block of the stem."""
    attend = {"ea": _token_attention, "performer": _performer, "transformer": _self_attention}
    tokens = attend[stem](block.attention, block.norm1(patches))
    return tokens + block.mlp(block.norm2(tokens))


def _normalized(logits: Tensor, eps: float) -> Tensor:
    """Return softmax over tokens (next to last), then divide by the sum over slots (last)."""
    attention = torch.softmax(logits, dim=-2)
    return attention / (eps + attention.sum(dim=-1, keepdim=True))


def _token_attention(layer: Any, x: Tensor) -> Tensor:
    """Return external attention of the stem, whose residual is the query."""
    query = layer.query(x)
    attention = _normalized(F.linear(query, layer.memory_key), layer.eps)
    attention = F.dropout(attention, layer.attention_dropout, layer.training)
    result = F.linear(attention, layer.values.transpose(0, 1), layer.memory_value_bias)
    return query + F.dropout(layer.projection(result), layer.projection_dropout, layer.training)


def _multi_head(layer: Any, x: Tensor) -> Tensor:
    """Return multi-head external attention."""
    batch, tokens, _ = x.shape
    heads = layer.query(x).view(batch, tokens, layer.num_heads, -1).permute(0, 2, 1, 3)
    logits = F.linear(heads, layer.memory_key, layer.memory_key_bias)
    attention = _normalized(logits, layer.eps)
    attention = F.dropout(attention, layer.attention_dropout, layer.training)
    result = F.linear(attention, layer.values.transpose(0, 1), layer.memory_value_bias)
    result = layer.projection(result.permute(0, 2, 1, 3).reshape(batch, tokens, -1))
    return F.dropout(result, layer.projection_dropout, layer.training)


def _self_attention(layer: Any, x: Tensor) -> Tensor:
    """Return self-attention with its map formed."""
    batch, tokens, _ = x.shape
    qkv = layer.qkv(x).reshape(batch, tokens, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    queries, keys, values = qkv.unbind(0)
    attention = torch.softmax((queries * layer.scale) @ keys.transpose(-2, -1), dim=-1)
    attention = F.dropout(attention, layer.attention_dropout, layer.training)
    out = layer.projection((attention @ values).transpose(1, 2).reshape(batch, tokens, -1))
    out = F.dropout(out, layer.projection_dropout, layer.training)
    return out if layer.residual == "none" else out + values.squeeze(1)


def _performer(layer: Any, x: Tensor) -> Tensor:
    """Return Performer attention of the stem, whose residual is the value."""
    keys, queries, values = torch.split(layer.keys_queries_values(x), layer.features.shape[1], -1)

    def positive(vectors: Tensor) -> Tensor:
        half_square = (vectors * vectors).sum(dim=-1, keepdim=True) / 2
        exponent = torch.einsum("bti,mi->btm", vectors, layer.features)
        return torch.exp(exponent - half_square) / math.sqrt(layer.features.shape[0])

    key_features, query_features = positive(keys), positive(queries)
    norm = torch.einsum("bti,bi->bt", query_features, key_features.sum(dim=1)).unsqueeze(2)
    summary = torch.einsum("bin,bim->bnm", values, key_features)
    attended = torch.einsum("bti,bni->btn", query_features, summary) / (norm + 1e-8)
    return values + layer.dropout(layer.projection(attended))
