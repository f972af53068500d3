"""The tiled path: by hand, against an explicit float64 softmax, and against transformers' own attention."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close, near
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctxlens.errors import InputError
from ctxlens.models.attention.fused import augmented_attention
from ctxlens.models.attention.tiled import TILE_COPIES, tiled_attention

LOG3 = math.log(3.0)

# One head of size 1, scale 1, one query 1, keys log 3 and 0: weights 3/4 and 1/4.
ONE = {"query": torch.ones(1, 1, 1, 1), "key": torch.tensor([LOG3, 0.0]).reshape(1, 1, 2, 1)}
VALUES = torch.tensor([10.0, 20.0]).reshape(1, 1, 2, 1)
ROLES = torch.tensor([[0, 1]])


def bottom_right(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def explicit(
    query, key, value, role_ids, n_roles,
    *, bias=None, visible=None, scale=None, softcap=None, sinks=None, position_bias=None,
):  # fmt: skip
    """The definition, in float64, with whole patterns; bias [batch, head, query, key]."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bhqd,bhkd->bhqk", query.double(), keys) * factor
    if position_bias is not None:
        scores = scores + position_bias.double()
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = torch.where(visible, scores, -torch.inf)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    pattern = scores.softmax(-1)
    shares = torch.zeros(*scores.shape[:3], n_roles + (sinks is not None), dtype=torch.float64)
    for role in range(n_roles):
        of_role = (role_ids == role).double()[:, None, None]
        shares[..., role] = (pattern[..., : key.shape[2]] * of_role).sum(-1)
    if sinks is not None:
        shares[..., -1] = pattern[..., -1]
    return torch.einsum("bhqk,bhkd->bhqd", pattern[..., : key.shape[2]], values), shares


def random_inputs(batch=2, heads=4, kv_heads=2, queries=7, keys=7, d_head=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, d_head, generator=generator, dtype=dtype) * 2
    key = torch.randn(batch, kv_heads, keys, d_head, generator=generator, dtype=dtype) * 2
    value = torch.randn(batch, kv_heads, keys, d_head + 1, generator=generator, dtype=dtype)
    role_ids = torch.randint(-1, 4, (batch, keys), generator=generator)
    return query, key, value, role_ids


class TestByHand:
    def test_softcap(self):
        # Capped at 1 the scores are tanh(log 3) = (9 - 1) / (9 + 1) = 0.8 and 0.
        output, shares = tiled_attention(
            **ONE, value=VALUES, role_ids=ROLES, n_roles=2, scale=1.0, softcap=1.0
        )
        first = math.exp(0.8) / (math.exp(0.8) + 1)
        assert shares.flatten().tolist() == near([first, 1 - first])
        assert output.item() == near(first * 10 + (1 - first) * 20)

    def test_steering_comes_after_the_softcap(self):
        # exp(0.8) / 2 against 1: were the bias capped too, the ratio would be another one.
        _, shares = tiled_attention(
            **ONE,
            value=VALUES,
            role_ids=ROLES,
            n_roles=2,
            scale=1.0,
            softcap=1.0,
            key_bias=torch.tensor([[math.log(0.5), 0.0]]),
        )
        first = math.exp(0.8) / 2
        assert shares.flatten().tolist() == near([first / (first + 1), 1 / (first + 1)])

    def test_sink_takes_its_share_and_gives_no_value(self):
        # Weights 3, 1 and the sink's exp(log 4) = 4.
        output, shares = tiled_attention(
            **ONE, value=VALUES, role_ids=ROLES, n_roles=2, scale=1.0, sinks=torch.tensor([math.log(4.0)])
        )
        assert shares.flatten().tolist() == near([3 / 8, 1 / 8, 4 / 8])
        assert output.item() == near(3 / 8 * 10 + 1 / 8 * 20)

    def test_steering_leaves_the_sink_alone(self):
        # Weights 3/2, 1 and 4.
        _, shares = tiled_attention(
            **ONE,
            value=VALUES,
            role_ids=ROLES,
            n_roles=2,
            scale=1.0,
            sinks=torch.tensor([math.log(4.0)]),
            key_bias=torch.tensor([[math.log(0.5), 0.0]]),
        )
        assert shares.flatten().tolist() == near([1.5 / 6.5, 1 / 6.5, 4 / 6.5])

    def test_position_bias(self):
        # log 2 on the second key: weights 3 and 2.
        _, shares = tiled_attention(
            **ONE,
            value=VALUES,
            role_ids=ROLES,
            n_roles=2,
            scale=1.0,
            position_bias=torch.tensor([0.0, math.log(2.0)]).reshape(1, 1, 1, 2),
        )
        assert shares.flatten().tolist() == near([3 / 5, 2 / 5])

    def test_position_bias_is_capped_with_the_score(self):
        # Scores log 3 and 0, bias 0 and log 3, capped at 1: both 0.8.
        _, shares = tiled_attention(
            **ONE,
            value=VALUES,
            role_ids=ROLES,
            n_roles=2,
            scale=1.0,
            softcap=1.0,
            position_bias=torch.tensor([0.0, LOG3]).reshape(1, 1, 1, 2),
        )
        assert shares.flatten().tolist() == near([0.5, 0.5])

    def test_blinded_keys_leave_all_to_the_sink(self):
        _, shares = tiled_attention(
            **ONE,
            value=VALUES,
            role_ids=ROLES,
            n_roles=2,
            sinks=torch.zeros(1),
            key_bias=torch.full((1, 2), -torch.inf),
        )
        assert shares.flatten().tolist() == near([0, 0, 1])


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_parity_with_the_explicit_softmax(data):
    def choose(*options):
        return data.draw(st.sampled_from(options))

    batch, kv_heads, groups = choose(1, 2), choose(1, 2), choose(1, 2, 3)
    keys = data.draw(st.integers(1, 9))
    queries = data.draw(st.integers(1, keys))
    heads = kv_heads * groups
    query, key, value, role_ids = random_inputs(
        batch, heads, kv_heads, queries, keys, choose(1, 4), seed=data.draw(st.integers(0, 99))
    )
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    softcap = choose(None, 0.5, 30.0)
    scale = choose(None, 0.3)
    sinks = choose(None, random(heads))
    position_bias = choose(
        None, random(1, heads, 1, keys), random(batch, 1, queries, keys), random(batch, heads, queries, keys)
    )
    is_causal = choose(False, True)
    visible = bottom_right(queries, keys)[None, None] if is_causal else torch.tensor(True)
    masking = choose("none", "bool", "float")
    mask = None
    if masking != "none":
        seen = torch.rand(batch, choose(1, heads), queries, keys, generator=generator) < 0.7
        seen[..., 0] = True
        mask = seen if masking == "bool" else torch.where(seen, random(queries, keys), -1e30)
        visible = visible & seen
    bias = None if masking != "float" else mask.double()
    steering = {}
    if choose(True, False):
        n_biases = choose(0, 1, 2)  # 0: no axis for them
        key_bias = random(batch, keys, max(1, n_biases))
        select = random(*choose((heads,), (batch, heads, queries)), max(1, n_biases))
        full = select[:, None].expand(heads, queries, -1) if select.ndim == 2 else select
        added = (full[..., None, :] * key_bias[:, None, None]).sum(-1).double()
        bias = added if bias is None else bias + added
        if not n_biases:
            key_bias, select = key_bias[..., 0], select[..., 0]
        steering = {"key_bias": key_bias, "head_select": select}
    terms = {"scale": scale, "softcap": softcap, "sinks": sinks, "position_bias": position_bias}
    output, shares = tiled_attention(
        query, key, value, role_ids=role_ids, n_roles=4, attn_mask=mask, is_causal=is_causal,
        tile=choose(1, 2, 3, 100), **steering, **terms,
    )  # fmt: skip
    want_output, want = explicit(query, key, value, role_ids, 4, bias=bias, visible=visible, **terms)
    assert (output.dtype, shares.dtype) == (torch.float32, torch.float32)
    assert_close(output, want_output)
    assert_close(shares, want)


@pytest.mark.parametrize("tile", [1, 3, 7, 256])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 7), (1, 7)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_without_foreign_terms_it_is_the_fused_call(tile, queries, keys, is_causal):
    query, key, value, role_ids = random_inputs(queries=queries, keys=keys)
    mask = torch.ones(2, 1, queries, keys, dtype=torch.bool)
    mask[1, :, :, 1] = False
    rest = {
        "role_ids": role_ids,
        "n_roles": 4,
        "key_bias": torch.stack([torch.where(role_ids == 2, 0.0, -1.0), role_ids * -0.3], -1),
        "head_select": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]),
        "attn_mask": mask,
        "is_causal": is_causal,
    }
    output, shares = tiled_attention(query, key, value, **rest, tile=tile)
    want_output, want = augmented_attention(query, key, value, **rest)
    assert_close(output, want_output)
    assert_close(shares, want)


def test_blinding_is_that_of_the_fused_call():
    query, key, value, role_ids = random_inputs()
    role_ids[:, 0] = 0
    rest = {
        "role_ids": role_ids,
        "n_roles": 4,
        "key_bias": torch.where(role_ids == 1, -torch.inf, 0.0),
        "head_select": torch.tensor([1.0, 0.0, 0.5, 0.0]),
        "is_causal": True,
    }
    output, shares = tiled_attention(query, key, value, **rest, tile=2)
    want_output, want = augmented_attention(query, key, value, **rest)
    assert shares[:, ::2, :, 1].max() < 1e-6
    assert_close(output, want_output)
    assert_close(shares, want)


def test_without_roles_there_are_no_shares():
    query, key, value, _ = random_inputs()
    output, shares = tiled_attention(query, key, value, role_ids=None, n_roles=0, is_causal=True)
    plain = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    assert shares is None
    assert_close(output, plain)


def test_gradients_are_those_of_the_definition():
    query, key, value, role_ids = random_inputs(dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    sinks = torch.randn(4, generator=generator, dtype=torch.float64)
    position = torch.randn(1, 4, 1, 7, generator=generator, dtype=torch.float64)
    bias = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    select = torch.rand(4, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 4, 7, 5, generator=generator, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (query, key, value, bias, select, sinks, position)]
    terms = {"softcap": 2.0, "sinks": sinks, "position_bias": position}

    def gradients(output, shares):
        loss = (output.sin() * 0.1).sum() + (shares.double() * weights).sum()
        return torch.autograd.grad(loss, inputs)

    got = gradients(
        *tiled_attention(
            query,
            key,
            value,
            role_ids=role_ids,
            n_roles=4,
            key_bias=bias,
            head_select=select,
            is_causal=True,
            tile=3,
            **terms,
        )
    )
    full = select[None, :, None, None] * bias[:, None, None, :]
    want = gradients(
        *explicit(query, key, value, role_ids, 4, bias=full, visible=bottom_right(7, 7), **terms)
    )
    for ours, definition in zip(got, want, strict=True):
        assert_close(ours, definition, dtype=torch.float32)  # shares are float32


@pytest.mark.parametrize("masking", ["bool", "float"])
def test_a_query_without_any_key_has_no_shares_and_no_gradient(masking):
    query, key, value, role_ids = random_inputs()
    query.requires_grad_()
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[1, :, :3] = False
    if masking == "float":
        mask = torch.where(mask, 0.0, -torch.inf)
    output, shares = tiled_attention(query, key, value, role_ids=role_ids, n_roles=4, attn_mask=mask, tile=2)
    output.sum().backward()
    assert output.isfinite().all()
    assert query.grad.isfinite().all()
    assert query.grad[1, :, :3].abs().max() == 0
    assert shares[1, :, :3].abs().max() == 0


def test_no_pattern_is_larger_than_a_tile():
    length, tile = 512, 64
    query, key, value, role_ids = random_inputs(1, 4, 2, length, length)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            self.numel = max(self.numel, *(x.numel() for x in tree_leaves(made) if torch.is_tensor(x)), 0)
            return made

    with Largest() as largest:
        tiled_attention(
            query, key, value, role_ids=role_ids, n_roles=4, is_causal=True, softcap=5.0, tile=tile
        )
    assert largest.numel == 4 * tile * length


def test_no_pattern_is_kept_for_the_gradient():
    length = 512
    query, key, value, role_ids = random_inputs(1, 4, 2, length, length)
    query.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        output, _ = tiled_attention(
            query, key, value, role_ids=role_ids, n_roles=4, is_causal=True, softcap=5.0, tile=64
        )
        assert sum(kept) < 4 * length * length / 16
        output.sum().backward()
    assert query.grad.isfinite().all()


def test_gemma2_eager_attention():
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    query, key, value, role_ids = random_inputs()
    module = torch.nn.Module().eval()
    module.num_key_value_groups, module.head_dim = 2, 8
    mask = torch.where(bottom_right(7, 7), 0.0, torch.finfo(torch.float32).min)[None, None]
    want, pattern = eager_attention_forward(module, query, key, value, mask, scaling=0.4, softcap=3.0)
    output, shares = tiled_attention(
        query, key, value, role_ids=role_ids, n_roles=4, attn_mask=mask, scale=0.4, softcap=3.0, tile=3
    )
    assert_close(output.transpose(1, 2), want)
    for role in range(4):
        of_role = (pattern * (role_ids == role)[:, None, None]).sum(-1)
        assert_close(shares[..., role], of_role)


def test_gpt_oss_eager_attention():
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    query, key, value, role_ids = random_inputs()
    module = torch.nn.Module().eval()
    module.num_key_value_groups, module.sinks = 2, torch.tensor([0.5, -1.0, 3.0, 0.0])
    mask = torch.where(bottom_right(7, 7), 0.0, torch.finfo(torch.float32).min)[None, None]
    want, pattern = eager_attention_forward(module, query, key, value, mask, scaling=0.4)
    output, shares = tiled_attention(
        query, key, value, role_ids=role_ids, n_roles=4, is_causal=True, scale=0.4, sinks=module.sinks, tile=3
    )
    assert_close(output.transpose(1, 2), want)
    assert_close(shares[..., -1], 1 - pattern.sum(-1))
    for role in range(4):
        of_role = (pattern * (role_ids == role)[:, None, None]).sum(-1)
        assert_close(shares[..., role], of_role)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_lose_nothing_in_the_shares(dtype):
    query, key, value, role_ids = random_inputs(dtype=dtype)
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=dtype)
    output, shares = tiled_attention(
        query, key, value, role_ids=role_ids, n_roles=4, is_causal=True, softcap=5.0, sinks=sinks
    )
    want_output, want = explicit(
        query, key, value, role_ids, 4, visible=bottom_right(7, 7), softcap=5.0, sinks=sinks
    )
    assert (output.dtype, shares.dtype) == (dtype, torch.float32)
    assert_close(shares, want)
    assert_close(output, want_output, n_terms=1, room=2)


def test_blinding_every_visible_key_is_refused():
    query, key, value, role_ids = random_inputs()
    bias = torch.zeros(2, 7)
    bias[1, :4] = -torch.inf
    rest = {"role_ids": role_ids, "n_roles": 4, "key_bias": bias, "tile": 2}
    tiled_attention(query, key, value, **rest)
    with pytest.raises(InputError, match=r"\(1, 0, 0\) can see is blinded"):
        tiled_attention(query, key, value, **rest, is_causal=True)
    late = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    late[1, :, 5, 4:] = False
    with pytest.raises(InputError, match=r"\(1, 0, 5\) can see is blinded"):
        tiled_attention(query, key, value, **rest, attn_mask=late)
    far = torch.where(late, 0.0, torch.finfo(torch.float32).min)
    with pytest.raises(InputError, match=r"\(1, 0, 5\) can see is blinded"):
        tiled_attention(query, key, value, **rest, attn_mask=far)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tile": 0}, "tile is 0; expected"),
        ({"softcap": 0.0}, "softcap is 0.0; expected"),
        ({"sinks": torch.zeros(3)}, r"sinks have shape \(3,\); expected \[head\] = \[4\]"),
        ({"position_bias": torch.zeros(1, 1, 7, 6)}, r"position_bias has shape \(1, 1, 7, 6\); expected"),
        ({"position_bias": torch.zeros(7, 7)}, r"position_bias has shape \(7, 7\); expected"),
        ({"role_ids": torch.zeros(2, 6, dtype=torch.long)}, r"role_ids has shape \(2, 6\)"),
        (
            {"key_bias": torch.zeros(2, 7), "head_select": torch.ones(2, 4, 9), "tile": 2},
            r"head_select has shape \(2, 4, 9\)",
        ),
    ],
)
def test_wrong_arguments_are_named(change, words):
    query, key, value, role_ids = random_inputs()
    arguments = {"query": query, "key": key, "value": value, "role_ids": role_ids, "n_roles": 4, **change}
    with pytest.raises(InputError, match=words):
        inspect.unwrap(tiled_attention)(**arguments)  # without the tests' own check of shapes


def test_the_default_tile_has_256_queries():
    query, key, value, role_ids = random_inputs(1, 2, 1, 300, 300)
    sizes = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            sizes.extend(
                x.shape[-2] for x in tree_leaves(made) if torch.is_tensor(x) and x.shape[-1:] == (300,)
            )
            return made

    with Shapes():
        tiled_attention(query, key, value, role_ids=role_ids, n_roles=4, softcap=5.0)
    assert max(sizes) == 512  # 256 queries of two heads of one group
    assert TILE_COPIES == 3


def test_a_float_mask_and_causality_together():
    # Equal scores, two queries, three keys; the mask doubles the weight of key 0: 2, 1 and 2, 1, 1.
    zeros = torch.zeros(1, 1, 3, 1)
    mask = torch.zeros(1, 1, 2, 3)
    mask[..., 0] = math.log(2.0)
    _, shares = tiled_attention(
        zeros[:, :, :2], zeros, zeros, role_ids=torch.tensor([[0, 1, 2]]), n_roles=3, attn_mask=mask,
        is_causal=True, tile=1,
    )  # fmt: skip
    assert shares[0, 0].tolist() == [near([2 / 3, 1 / 3, 0]), near([1 / 2, 1 / 4, 1 / 4])]


def test_a_tile_takes_its_own_rows_of_every_term():
    # Scores are equal, but query 0 doubles key 0 and query 1 triples key 1. The steering weighs query 0 once
    # and query 1 twice, so the first key loses a factor of 2 and of 4.
    zeros = torch.zeros(1, 1, 2, 1)
    position = torch.tensor([[math.log(2.0), 0.0], [0.0, LOG3]])[None, None]
    _, shares = tiled_attention(
        zeros, zeros, zeros, role_ids=ROLES, n_roles=2, position_bias=position, tile=1,
        key_bias=torch.tensor([[math.log(0.5), 0.0]]), head_select=torch.tensor([[[1.0, 2.0]]]),
    )  # fmt: skip
    assert shares[0, 0].tolist() == [near([1 / 2, 1 / 2]), near([1 / 13, 12 / 13])]


def test_gradients_of_leaves_that_are_not_queries():
    query, key, value, role_ids = random_inputs()
    sinks = torch.zeros(4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        output, _ = tiled_attention(query, key, value, role_ids=role_ids, n_roles=4, sinks=sinks, tile=2)
    assert max(saved, default=0) < 4 * 7 * 7
    output.sum().backward()
    assert sinks.grad is not None
    assert sinks.grad.abs().max() > 0
