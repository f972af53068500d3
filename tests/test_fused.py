"""The fused call: by hand, then against an explicit float64 softmax."""

import inspect
import math

import pytest
import torch
from numerics import assert_close, near

from ctxlens.errors import InputError
from ctxlens.models.attention import fused
from ctxlens.models.attention.fused import (
    append_sink,
    augmented_attention,
    compute_attention_pattern,
    compute_score_bias,
    count_bias_columns,
    mark_roles,
    padded_width,
    score_keys,
)

LOG3 = math.log(3.0)


def explicit(query, key, value, role_ids, n_roles, bias=None, mask=None, scale=None):
    """The definition, in float64: bias [batch, head, query, key], mask True where visible."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    pattern = scores.softmax(-1)
    one_hot = (role_ids[..., None] == torch.arange(n_roles)).double()
    return pattern @ value, pattern @ one_hot[:, None], pattern


def random_inputs(batch=2, heads=4, kv_heads=4, queries=7, keys=7, d_head=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, d_head, generator=generator, dtype=dtype)
    key = torch.randn(batch, kv_heads, keys, d_head, generator=generator, dtype=dtype)
    value = torch.randn(batch, kv_heads, keys, d_head, generator=generator, dtype=dtype)
    role_ids = torch.randint(0, 5, (batch, keys), generator=generator)
    return query, key, value, role_ids


def bottom_right(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


# One head of size 1, scale 1, one query 1, keys log 3 and 0: weights 3/4 and 1/4.
ONE = {"query": torch.ones(1, 1, 1, 1), "key": torch.tensor([LOG3, 0.0]).reshape(1, 1, 2, 1)}
VALUES = torch.tensor([10.0, 20.0]).reshape(1, 1, 2, 1)


class TestByHand:
    def test_output_and_shares(self):
        output, shares = augmented_attention(
            **ONE, value=VALUES, role_ids=torch.tensor([[2, 0]]), n_roles=3, scale=1.0
        )
        assert output.item() == near(0.75 * 10 + 0.25 * 20)
        assert shares.flatten().tolist() == near([0.25, 0.0, 0.75])

    def test_key_without_role_counts_nowhere(self):
        _, shares = augmented_attention(
            **ONE, value=VALUES, role_ids=torch.tensor([[-1, 0]]), n_roles=2, scale=1.0
        )
        assert shares.flatten().tolist() == near([0.25, 0.0])

    def test_bias_is_the_papers_formula(self):
        # alpha = 1/2 on the first key: 3/8 and 1/4, divided by Z = 5/8: 3/5 and 2/5.
        output, shares = augmented_attention(
            **ONE,
            value=VALUES,
            role_ids=torch.tensor([[0, 1]]),
            n_roles=2,
            key_bias=torch.tensor([[math.log(0.5), 0.0]]),
            scale=1.0,
        )
        assert shares.flatten().tolist() == near([0.6, 0.4])
        assert output.item() == near(0.6 * 10 + 0.4 * 20)

    def test_head_weight_scales_the_bias(self):
        # Weight 2 applies alpha twice: 3/16 and 1/4, divided by 7/16: 3/7 and 4/7.
        _, shares = augmented_attention(
            **ONE,
            value=VALUES,
            role_ids=torch.tensor([[0, 1]]),
            n_roles=2,
            key_bias=torch.tensor([[math.log(0.5), 0.0]]),
            head_select=torch.tensor([2.0]),
            scale=1.0,
        )
        assert shares.flatten().tolist() == near([3 / 7, 4 / 7])

    def test_only_the_chosen_head(self):
        two = {name: x.expand(1, 2, -1, -1) for name, x in ONE.items()}
        _, shares = augmented_attention(
            **two,
            value=VALUES.expand(1, 2, -1, -1),
            role_ids=torch.tensor([[0, 1]]),
            n_roles=2,
            key_bias=torch.tensor([[math.log(0.5), 0.0]]),
            head_select=torch.tensor([0.0, 1.0]),
            scale=1.0,
        )
        assert shares[0, :, 0].flatten().tolist() == near([0.75, 0.25, 0.6, 0.4])

    def test_blinding_leaves_other_heads_exact(self):
        two = {name: x.expand(1, 2, -1, -1) for name, x in ONE.items()}
        output, shares = augmented_attention(
            **two,
            value=VALUES.expand(1, 2, -1, -1),
            role_ids=torch.tensor([[0, 1]]),
            n_roles=2,
            key_bias=torch.tensor([[-math.inf, 0.0]]),
            head_select=torch.tensor([0.0, 0.5]),
            scale=1.0,
        )
        assert shares[0, 0, 0].tolist() == near([0.75, 0.25])
        assert shares[0, 1, 0, 0] < 1e-6
        assert output[0, 1].item() == near(20.0)

    def test_causal_with_a_cache_is_aligned_at_the_end(self):
        # Two queries, three keys of equal score: the first sees two keys, the second three.
        zeros = torch.zeros(1, 1, 3, 1)
        _, shares = augmented_attention(
            zeros[:, :, :2],
            zeros,
            zeros,
            role_ids=torch.tensor([[0, 1, 2]]),
            n_roles=3,
            is_causal=True,
        )
        assert shares[0, 0, 0].tolist() == near([1 / 2, 1 / 2, 0])
        assert shares[0, 0, 1].tolist() == near([1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 7), (1, 7)])
@pytest.mark.parametrize("masking", ["none", "causal", "bool", "float", "causal+bool"])
def test_parity_with_explicit_softmax(kv_heads, queries, keys, masking):
    query, key, value, role_ids = random_inputs(kv_heads=kv_heads, queries=queries, keys=keys)
    bias = torch.where(role_ids == 2, 0.0, math.log(0.3))
    select = torch.tensor([1.0, 0.0, 2.0, 0.5])
    padding = torch.ones(2, 1, queries, keys, dtype=torch.bool)
    padding[1, :, :, 1] = False
    mask = {"none": None, "causal": None, "float": torch.where(padding, 0.0, -1e30)}.get(masking, padding)
    visible = torch.ones(2, 1, queries, keys, dtype=torch.bool)
    if "causal" in masking:
        visible = visible & bottom_right(queries, keys)
    if mask is not None:
        visible = visible & padding
    output, shares = augmented_attention(
        query,
        key,
        value,
        role_ids=role_ids,
        n_roles=5,
        key_bias=bias,
        head_select=select,
        attn_mask=mask,
        is_causal="causal" in masking,
    )
    full = select.double()[None, :, None, None] * bias.double()[:, None, None, :]
    want_output, want_shares, _ = explicit(query, key, value, role_ids, 5, full, visible)
    assert_close(output, want_output)
    assert_close(shares, want_shares)
    assert_close(shares.sum(-1), torch.ones(2, 4, queries))


def test_head_select_per_position():
    query, key, value, role_ids = random_inputs()
    bias = torch.where(role_ids == 2, 0.0, math.log(0.3))
    select = torch.rand(2, 4, 7, generator=torch.Generator().manual_seed(1))
    _, shares = augmented_attention(
        query, key, value, role_ids=role_ids, n_roles=5, key_bias=bias, head_select=select, is_causal=True
    )
    full = select.double()[..., None] * bias.double()[:, None, None, :]
    _, want, _ = explicit(query, key, value, role_ids, 5, full, bottom_right(7, 7))
    assert_close(shares, want)


def test_several_biases_add_up():
    query, key, value, role_ids = random_inputs()
    biases = torch.stack([torch.where(role_ids == 2, 0.0, -1.0), torch.where(role_ids == 1, 0.0, -0.5)], -1)
    select = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    rest = {"key_bias": biases, "head_select": select, "is_causal": True}
    _, shares = augmented_attention(query, key, value, role_ids=role_ids, n_roles=5, **rest)
    full = torch.einsum("hs,bks->bhk", select.double(), biases.double())[:, :, None]
    _, want, pattern = explicit(query, key, value, role_ids, 5, full, bottom_right(7, 7))
    assert_close(shares, want)
    got = compute_attention_pattern(query, key, **rest)
    assert_close(got, pattern)
    additive = compute_score_bias(query, biases, select)
    assert_close(additive, full.expand_as(additive))


def test_without_roles_and_bias_it_is_plain_attention():
    query, key, value, _ = random_inputs(kv_heads=2)
    output, shares = augmented_attention(query, key, value, role_ids=None, n_roles=0, is_causal=True)
    plain = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    assert shares is None
    assert torch.equal(output, plain)


def test_gradients_reach_everything():
    query, key, value, role_ids = random_inputs(dtype=torch.float64, queries=4, keys=4, kv_heads=2)
    bias = torch.where(role_ids == 2, 0.0, math.log(0.3)).double()
    select = torch.rand(4, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (query, key, value, bias, select)]

    def run(query, key, value, bias, select):
        output, shares = augmented_attention(
            query, key, value, role_ids=role_ids, n_roles=5, key_bias=bias, head_select=select, is_causal=True
        )
        return output, shares

    torch.autograd.backward([x.sum() for x in run(*inputs)])
    assert all(x.grad is not None for x in inputs)
    got = [x.grad.clone() for x in inputs]
    for x in inputs:
        x.grad = None
    full = select[None, :, None, None] * bias[:, None, None, :]
    output, shares, _ = explicit(query, key, value, role_ids, 5, full, bottom_right(4, 4))
    (output.sum() + shares.sum()).backward()
    for x, g in zip(inputs, got, strict=True):
        assert_close(g, x.grad, dtype=torch.float32)  # shares are float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_head", [16, 20, 128])
def test_sixteen_bit(dtype, d_head):
    query, key, value, role_ids = random_inputs(d_head=d_head, dtype=dtype)
    bias = torch.where(role_ids == 2, 0.0, math.log(0.3))
    output, shares = augmented_attention(
        query, key, value, role_ids=role_ids, n_roles=5, key_bias=bias, is_causal=True
    )
    want_output, want, _ = explicit(
        query, key, value, role_ids, 5, bias.double()[:, None, None, :], bottom_right(7, 7)
    )
    assert (output.dtype, shares.dtype) == (dtype, torch.float32)
    # Scores, weights and outputs are rounded once each; everything between is float32.
    assert_close(shares, want, dtype=dtype, n_terms=1, magnitude=1.0, room=2)
    assert_close(output, want_output, n_terms=1, room=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blinding_in_every_dtype(dtype):
    query, key, value, role_ids = random_inputs(dtype=dtype)
    role_ids[:, 0] = 0
    bias = torch.where(role_ids == 1, -torch.inf, 0.0)
    output, shares = augmented_attention(
        query, key, value, role_ids=role_ids, n_roles=5, key_bias=bias, is_causal=True
    )
    assert output.isfinite().all()
    assert shares[..., 1].max() < 1e-6


def test_a_query_without_any_key_has_no_shares():
    query, key, value, role_ids = random_inputs()
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[1, :, :3] = False
    output, shares = augmented_attention(query, key, value, role_ids=role_ids, n_roles=5, attn_mask=mask)
    assert output.isfinite().all()
    assert shares[1, :, :3].abs().max() == 0


def test_blinding_every_visible_key_is_refused():
    query, key, value, role_ids = random_inputs()
    bias = torch.zeros(2, 7)
    bias[1, :3] = -torch.inf
    rest = {"role_ids": role_ids, "n_roles": 5, "key_bias": bias}
    augmented_attention(query, key, value, **rest)
    with pytest.raises(InputError, match=r"\(1, 0, 0\) can see is blinded"):
        augmented_attention(query, key, value, **rest, is_causal=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"role_ids": torch.zeros(2, 6, dtype=torch.long)}, r"role_ids has shape \(2, 6\).*\[2, 7\]"),
        ({"key_bias": torch.zeros(1, 7)}, r"key_bias has shape \(1, 7\)"),
        ({"attn_mask": torch.ones(2, 1, 7, 6, dtype=torch.bool)}, r"attn_mask has shape"),
        ({"key_bias": torch.zeros(2, 7), "head_select": torch.ones(3)}, r"head_select has shape \(3,\)"),
        ({"key": torch.zeros(2, 3, 7, 16), "value": torch.zeros(2, 3, 7, 16)}, "head a multiple of kv_head"),
    ],
)
def test_wrong_shapes_are_named(change, words):
    query, key, value, role_ids = random_inputs()
    arguments = {"query": query, "key": key, "value": value, "role_ids": role_ids, "n_roles": 5, **change}
    with pytest.raises(InputError, match=words):
        inspect.unwrap(augmented_attention)(**arguments)  # without the tests' own check of shapes


def test_more_causal_queries_than_keys_is_refused():
    query, key, value, role_ids = random_inputs(queries=7, keys=3)
    with pytest.raises(InputError, match="7 queries but 3 keys"):
        augmented_attention(query, key, value, role_ids=role_ids, n_roles=5, is_causal=True)


class TestParts:
    def test_widths_are_padded_to_eights(self):
        assert [padded_width(n) for n in (1, 8, 9, 17)] == [8, 8, 16, 24]

    @pytest.mark.parametrize(
        ("dtype", "columns"),
        [(torch.float32, 1), (torch.float16, 3), (torch.bfloat16, 3)],
    )
    def test_columns_of_a_bias(self, dtype, columns):
        query = torch.ones(1, 2, 3, 4, dtype=dtype)
        bias = torch.tensor([[0.3, -0.7]])
        made = fused._bias_columns(query, bias, torch.tensor([1.0, 3.0]), scale=0.3)
        assert len(made) == count_bias_columns(dtype) == columns
        # Times the scale, the products of all pairs add up to bias times weight.
        total = sum(0.3 * one.double()[0, :, 0, None] * other.double()[0] for one, other in made)
        want = torch.tensor([1.0, 3.0])[:, None].double() * bias.double()
        assert_close(total, want, dtype=torch.float32, n_terms=1 if columns == 1 else 2**14)
        # The weights are multiplied by the power of two next to 1 / 0.3, which loses nothing.
        assert made[0][0].flatten().tolist() == [4.0, 12.0]

    def test_a_blinded_key_takes_one_more_column(self):
        query = torch.ones(1, 2, 1, 4)
        bias, select = torch.tensor([[-torch.inf, -1.0]]), torch.tensor([0.0, 0.5])
        finite, blind = fused._bias_columns(query, bias, select, scale=0.5)
        assert [x.flatten().tolist() for x in finite] == [[0, 1], [0, -1]]
        assert [x.flatten().tolist() for x in blind] == [[0, 2], [-1e4, 0]]

    def test_blinding_in_an_additive_mask(self):
        query = torch.ones(1, 3, 1, 4)
        bias, select = torch.tensor([[-torch.inf, -1.0]]), torch.tensor([0.0, 0.5, -1.0])
        added = compute_score_bias(query, bias, select)
        assert added[0, :, 0].tolist() == [[0, 0], [-1e4, -0.5], [-1e4, 1]]

    def test_several_biases_in_an_additive_mask(self):
        bias = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])
        added = compute_score_bias(torch.ones(1, 2, 1, 4), bias, torch.tensor([[1.0, 0.0], [1.0, -1.0]]))
        assert added[0, :, 0].tolist() == [[1, 2], [-9, -18]]
        assert compute_score_bias(torch.ones(1, 2, 1, 4), bias).tolist() == [[[[11, 22]], [[11, 22]]]]

    def test_roles_are_marked(self):
        assert mark_roles(torch.tensor([[2, -1, 0, 3]]), 3, torch.float32).tolist() == [
            [[0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
        ]

    def test_heads_of_a_group_share_their_keys(self):
        # Heads 0 and 1 belong to the first key head, 2 and 3 to the second.
        query = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1).expand(1, 4, 2, 1)
        key = torch.tensor([10.0, 100.0]).reshape(1, 2, 1, 1)
        assert score_keys(query, key)[0, :, :, 0].tolist() == [[10, 10], [20, 20], [300, 300], [400, 400]]

    def test_the_sink_is_the_last_column(self):
        scores = torch.zeros(2, 2, 1, 3)
        assert append_sink(scores, torch.tensor([5.0, 6.0]))[1].tolist() == [[[0, 0, 0, 5]], [[0, 0, 0, 6]]]

    @pytest.mark.parametrize(("queries", "heads"), [(8, 2), (9, 4)])
    @pytest.mark.parametrize("mask_heads", [None, 1, 4])
    def test_few_queries_are_worked_on_by_group(self, queries, heads, mask_heads, monkeypatch):
        query, key, value, role_ids = random_inputs(kv_heads=2, queries=queries, keys=9)
        mask = None
        if mask_heads:
            mask = torch.rand(2, mask_heads, queries, 9, generator=torch.Generator().manual_seed(1)) < 0.7
            mask[..., 0] = True
        seen = []
        kernel = torch.nn.functional.scaled_dot_product_attention

        def spy(query, *args, **options):
            seen.append(query.shape[1])
            return kernel(query, *args, **options)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        output, shares = augmented_attention(query, key, value, role_ids=role_ids, n_roles=5, attn_mask=mask)
        assert seen == [heads]
        want_output, want, _ = explicit(query, key, value, role_ids, 5, None, mask)
        assert_close(output, want_output)
        assert_close(shares, want)

    def test_the_pattern_has_all_terms(self):
        # Scores log 6 and log 3 are capped at 1 to a and b; the bias halves the first; the sink weighs 4.
        pattern = compute_attention_pattern(
            **ONE,
            scale=1.0,
            softcap=1.0,
            position_bias=torch.tensor([math.log(2.0), LOG3]).reshape(1, 1, 1, 2),
            key_bias=torch.tensor([[math.log(0.5), 0.0]]),
            sinks=torch.tensor([math.log(4.0)]),
        )
        a, b = math.exp(math.tanh(math.log(6.0))) / 2, math.exp(math.tanh(LOG3))
        assert pattern.flatten().tolist() == near([a / (a + b + 4), b / (a + b + 4)])

    def test_the_pattern_is_masked(self):
        # Equal scores, two queries and three keys: causal from the end, one key hidden, all keys hidden.
        zeros = torch.zeros(1, 1, 3, 1)
        causal = compute_attention_pattern(zeros[:, :, :2], zeros, is_causal=True)
        assert causal[0, 0].tolist() == [near([1 / 2, 1 / 2, 0]), near([1 / 3, 1 / 3, 1 / 3])]
        square = compute_attention_pattern(zeros[:, :, :2], zeros[:, :, :2], is_causal=True)
        assert square[0, 0].tolist() == [[1, 0], [0.5, 0.5]]
        mask = torch.tensor([[False, True, True], [False, False, False]])[None, None]
        hidden = compute_attention_pattern(zeros[:, :, :2], zeros, attn_mask=mask)
        assert hidden[0, 0].tolist() == [near([0, 1 / 2, 1 / 2]), [0, 0, 0]]
        added = torch.tensor([[math.log(2.0), 0.0, 0.0], [0.0, 0.0, 0.0]])[None, None]
        weighted = compute_attention_pattern(zeros[:, :, :2], zeros, attn_mask=added)
        assert weighted[0, 0, 0].tolist() == near([1 / 2, 1 / 4, 1 / 4])

    def test_the_softcap_is_a_scaled_tanh(self):
        # Scores 2 and 0 under a cap of 4: 4 tanh(2 / 4) and 0.
        key = torch.tensor([[[[2.0], [0.0]]]])
        pattern = compute_attention_pattern(torch.ones(1, 1, 1, 1), key, scale=1.0, softcap=4.0)
        weight = math.exp(4 * math.tanh(0.5))
        assert pattern.flatten().tolist() == near([weight / (weight + 1), 1 / (weight + 1)])

    def test_a_float_mask_and_causality_hold_together(self):
        # Equal scores; the mask doubles key 0, causality hides key 2 from the first query.
        zeros = torch.zeros(1, 1, 3, 1)
        added = torch.tensor([[math.log(2.0), 0.0, 0.0]]).expand(1, 1, 2, 3)
        pattern = compute_attention_pattern(zeros[:, :, :2], zeros, attn_mask=added, is_causal=True)
        assert pattern[0, 0].tolist() == [near([2 / 3, 1 / 3, 0]), near([1 / 2, 1 / 4, 1 / 4])]
        output, _ = augmented_attention(
            zeros[:, :, :2], zeros, torch.eye(3)[None, None], role_ids=None, n_roles=0,
            attn_mask=added, is_causal=True,
        )  # fmt: skip
        assert output[0, 0].tolist() == [near([2 / 3, 1 / 3, 0]), near([1 / 2, 1 / 4, 1 / 4])]

    def test_blinding_a_key_of_a_causal_query_with_a_float_mask(self):
        # Query 1 sees keys 0 and 1; the mask hides key 0 and the bias blinds key 1.
        zeros = torch.zeros(1, 1, 2, 1)
        mask = torch.zeros(1, 1, 2, 2)
        mask[..., 1, 0] = torch.finfo(torch.float32).min
        rest = {
            "role_ids": torch.tensor([[0, 1]]),
            "n_roles": 2,
            "key_bias": torch.tensor([[0.0, -math.inf]]),
        }
        augmented_attention(zeros, zeros, zeros, **rest, is_causal=True)
        with pytest.raises(InputError, match=r"query \(0, 0, 1\) can see is blinded"):
            augmented_attention(zeros, zeros, zeros, **rest, attn_mask=mask, is_causal=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": torch.zeros(2, 4, 7, 8)}, r"key \(2, 4, 7, 8\) and value \(2, 4, 7, 16\) do not fit"),
        ({"key": torch.zeros(1, 4, 7, 16)}, "do not fit"),
        ({"value": torch.zeros(2, 4, 6, 16)}, "do not fit"),
        ({"role_ids": torch.zeros(1, 7, dtype=torch.long)}, r"role_ids has shape \(1, 7\)"),
        ({"attn_mask": torch.ones(2, 1, 6, 7, dtype=torch.bool)}, r"attn_mask has shape \(2, 1, 6, 7\)"),
        ({"head_select": torch.ones(2, 4, 6)}, r"head_select has shape \(2, 4, 6\)"),
        ({"head_select": torch.ones(3, 4, 7)}, r"head_select has shape \(3, 4, 7\)"),
        ({"head_select": torch.ones(2, 1, 7)}, r"head_select has shape \(2, 1, 7\)"),
        ({"key_bias": torch.zeros(2, 7, 2), "head_select": torch.ones(4, 1)}, "each with 2 biases last"),
    ],
)
def test_more_wrong_shapes_are_named(change, words):
    query, key, value, role_ids = random_inputs()
    arguments = {"query": query, "key": key, "value": value, "role_ids": role_ids, "n_roles": 5}
    arguments |= {"key_bias": torch.zeros(2, 7), **change}
    with pytest.raises(InputError, match=words):
        inspect.unwrap(augmented_attention)(**arguments)
