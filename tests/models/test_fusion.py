"""The bridge tower against transformers' BridgeTower, weights copied."""

import pytest
import torch
from transformers import BridgeTowerTextConfig
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer

from dist_fusion.models.layers import CrossLayer

WIDTH, HEADS = 32, 4


def theirs(seed):
    torch.manual_seed(seed)
    config = BridgeTowerTextConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=4 * WIDTH, layer_norm_eps=1e-5
    )
    config._attn_implementation = "eager"
    layer = BridgeTowerBertCrossLayer(config).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return layer


def ours(layer, order):
    """Their weights in a cross layer of ours."""
    copy = CrossLayer(WIDTH, HEADS, order, 0.0).eval()
    own, other = layer.attention, layer.crossattention
    with torch.no_grad():
        for part in ("weight", "bias"):
            joined = torch.cat([getattr(getattr(own.self, x), part) for x in ("query", "key", "value")])
            getattr(copy.self_attention.qkv, part).copy_(joined)
            for x in ("query", "key", "value"):
                getattr(getattr(copy.cross_attention, x), part).copy_(getattr(getattr(other.self, x), part))
            for mine, their in (
                (copy.self_attention.out, own.output.dense),
                (copy.norms["self"], own.output.LayerNorm),
                (copy.cross_attention.out, other.output.dense),
                (copy.norms["cross"], other.output.LayerNorm),
                (copy.feed[0], layer.intermediate.dense),
                (copy.feed[2], layer.output.dense),
                (copy.norms["feed"], layer.output.LayerNorm),
            ):
                getattr(mine, part).copy_(getattr(their, part))
    return copy


def shut(mask):
    """transformers' additive mask."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None]


@pytest.mark.parametrize("seed", range(3))
def test_a_post_layer_is_bridgetowers_cross_layer(seed):
    layer = theirs(seed)
    x, other = torch.randn(3, 7, WIDTH), torch.randn(3, 5, WIDTH)
    mask, other_mask = torch.rand(3, 7) < 0.7, torch.rand(3, 5) < 0.7
    mask[:, 0] = other_mask[:, 0] = True
    with torch.no_grad():
        told = layer(x, other, attention_mask=shut(mask), encoder_attention_mask=shut(other_mask))[0]
        post, query, key = ours(layer, ("self", "cross"))(x, mask, other, other_mask)
        pre, _, _ = ours(layer, ("cross", "self"))(x, mask, other, other_mask)
    assert (post - told).abs().max() < 1e-5
    assert (pre - told).abs().max() > 0.1
    assert (key - layer.crossattention.self.key(other).unflatten(-1, (HEADS, -1)).transpose(1, 2)).abs().max() < 1e-6
    assert query.shape == (3, HEADS, 7, WIDTH // HEADS)
