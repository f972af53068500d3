"""The memory forecast: by hand, and against the peaks that a profiler and the system measure."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_chat, make_tiny, make_tokenizer
from torch.profiler import ProfilerActivity, profile

from ctxlens.errors import InputError
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import TokenBatch
from ctxlens.models.backends.lens import LensBackend, bridge_from_hf
from ctxlens.models.backends.native import NativeBackend
from ctxlens.models.backends.native.sizes import layer_windows
from ctxlens.models.memory import fit_batch_tokens, forecast_memory, free_memory

LENGTH = 320
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
SHAPES = {
    "llama": WIDE,
    "llama-mqa": {**WIDE, "num_key_value_heads": 1, "intermediate_size": 64},
    "mistral": {**WIDE, "sliding_window": 128},
    "gemma2": {**WIDE, "head_dim": 16, "sliding_window": 128},
    "phi3": WIDE,
    "gpt2": {**WIDE, "num_key_value_heads": None, "n_positions": 4096},
    "mixtral": WIDE,
    "gpt-oss": {**WIDE, "head_dim": 16, "sliding_window": 128},
}
SLOW = {"gpt-oss", "gpt2"}


def wrap(hf_model, backend="native"):
    if backend == "lens":
        return SimpleNamespace(backend=LensBackend(bridge_from_hf(hf_model, make_tokenizer())))
    return SimpleNamespace(backend=NativeBackend(hf_model))


def measure_peak(run):
    """The peak of what torch holds on the CPU beyond what it held before, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def runs_of(backend, batch=1):
    """Every task's arguments for the forecast, and the run itself."""
    chats = [make_chat(LENGTH - 9 * row, seed=row) for row in range(batch)]
    right, left = (TokenBatch.from_chats(chats, pad_id=0, side=side) for side in ("right", "left"))
    everything = torch.arange(LENGTH - 9 * batch)[None].expand(batch, -1)
    layers = range(backend.shape.n_layers)
    steering = (Steering(0.3),)

    @torch.no_grad()
    def steer():
        backend.logits(right, steering)

    def generate():
        with backend.decoder(left, steering) as decode:
            tokens = left.tokens
            for _ in range(4):
                tokens = decode(tokens).argmax(-1)[:, None]

    return [
        ({"what": "read"}, lambda: backend.read_resting(right, layers, everything[:, :1], ())),
        (
            {"what": "read", "queries": everything.shape[1], "sinks": False},
            lambda: backend.read_shares(right, layers, everything, ()),
        ),
        ({"what": "steer"}, steer),
        ({"what": "generate", "new_tokens": 4}, generate),
    ]


class TestByHand:
    """3 layers, d_model 32, 4 heads of 8, 2 key-value heads, 48 wide, 64 tokens known; float32."""

    model = wrap(make_tiny("llama"))

    def test_weights(self):
        # A layer: q and o 32x32, k and v 32x16, gate, up and down 32x48, two norms; embeddings in and out.
        layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
        numbers = 3 * layer + 2 * 64 * 32 + 32
        rotary = 2 * 4  # inverse frequencies, and as they were
        assert forecast_memory(self.model, length=1).weights == 4 * (numbers + rotary)

    def test_read(self):
        forecast = forecast_memory(self.model, length=10, batch=2, layers=[0, 2], queries=3, sinks=False)
        tokens = 20
        assert forecast.resident == 4 * tokens * (2 * 32 + 2 * 8)
        # Normed input 32, queries 32, keys and values 16 each; columns: 8 + 8 roles = 16 wide, for 4 heads
        # of queries and outputs and 2 of keys and values: 12 x 16.
        assert forecast.attention == 4 * tokens * (32 + 32 + 2 * 16 + 12 * 16)
        assert forecast.feed_forward == 4 * tokens * (2 * 32 + 3 * 48)
        assert forecast.kept == 4 * 2 * 2 * 4 * 3 * 9  # layers, batch, heads, queries, roles
        assert forecast.paths == ("fused", "plain", "fused")
        assert (forecast.mask, forecast.cache, forecast.logits) == (0, 0, 0)
        assert forecast.run == forecast.resident + forecast.attention + forecast.kept
        assert forecast.total == forecast.weights + forecast.run

    def test_read_with_sinks(self):
        forecast = forecast_memory(self.model, length=10, batch=2, queries=3)
        without = forecast_memory(self.model, length=10, batch=2, queries=3, sinks=False)
        assert forecast.attention == without.attention  # ten sampled queries are less than the columns
        assert forecast.kept == 2 * without.kept
        assert forecast_memory(self.model, length=10, what="steer").run == (
            forecast_memory(self.model, length=10, what="steer", sinks=False).run
        )

    def test_sampled_queries_count_where_they_are_the_largest(self):
        # The pattern of 64 queries, 4 heads and 64 keys, twice in float32, after the normed input, queries,
        # keys and values.
        forecast = forecast_memory(self.model, length=64)
        assert forecast.attention == 4 * 64 * (32 + 32 + 2 * 16) + 2 * 4 * 64 * 4 * 64
        # With 4,096 tokens, 16 queries at a time have 2^18 scores; the columns are larger.
        long, without = (forecast_memory(self.model, length=4096, sinks=sinks) for sinks in (True, False))
        assert long.attention == without.attention

    def test_generate(self):
        forecast = forecast_memory(self.model, length=10, batch=2, what="generate", new_tokens=5)
        assert (
            forecast.cache == 4 * 2 * 2 * 3 * 15 * 16
        )  # keys and values, batch, layers, tokens, 2 heads of 8
        assert forecast.mask == 2 * 10 * 10  # left padding
        assert forecast.logits == 4 * 2 * 64
        assert forecast.kept == 0

    def test_steer_makes_logits_of_all_positions(self):
        assert forecast_memory(self.model, length=10, batch=2, what="steer").logits == 4 * 20 * 64

    def test_table_says_what_counts(self):
        rows = {name: (size, said) for name, size, said in forecast_memory(self.model, length=50).table()}
        assert rows["total"][0] == rows["weights"][0] + rows["run"][0]
        assert rows["attention"][1].endswith("(3 fused)")
        assert "cache" not in rows

    def test_peers_grow_with_the_square(self):
        short, long = (forecast_memory(self.model, length=n) for n in (100, 1000))
        assert long.run == pytest.approx(10 * short.run, rel=0.01)
        assert long.eager > 60 * short.eager
        assert long.lens_cache > 60 * short.lens_cache


def test_tied_weights_count_once():
    tied, untied = (
        forecast_memory(wrap(make_tiny("llama", tie_word_embeddings=tie)), length=1).weights
        for tie in (True, False)
    )
    assert untied - tied == 4 * 64 * 32


def test_windows_by_layer():
    assert layer_windows(make_tiny("llama").config) == (None, None, None)
    assert layer_windows(make_tiny("mistral").config) == (8, 8, 8)
    assert layer_windows(make_tiny("gemma2").config) == (8, None, 8)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] if f in SLOW else []) for f in SHAPES]
)
def test_peaks_are_met_within_a_quarter(family):
    model = wrap(make_tiny(family, **SHAPES[family]))
    for arguments, run in runs_of(model.backend):
        measured = measure_peak(run)
        forecast = forecast_memory(model, length=LENGTH, **arguments)
        assert measured / 1.25 < forecast.run < measured * 1.25, (arguments, measured, forecast)


def test_peaks_of_padded_batches_are_met_within_a_quarter():
    model = wrap(make_tiny("llama", **SHAPES["llama-mqa"]).bfloat16())
    for arguments, run in runs_of(model.backend, batch=3):
        measured = measure_peak(run)
        forecast = forecast_memory(model, length=LENGTH, batch=3, **arguments)
        assert measured / 1.25 < forecast.run < measured * 1.25, (arguments, measured, forecast)


def test_peaks_of_hooks_are_met_within_a_half():
    model = wrap(make_tiny("llama", **WIDE), "lens")
    for arguments, run in runs_of(model.backend):
        measured = measure_peak(run)
        forecast = forecast_memory(model, length=LENGTH, **arguments)
        assert forecast.paths == ("hooks",) * 3
        assert measured / 1.5 < forecast.run < measured * 1.5, (arguments, measured, forecast)


def test_eager_peer_is_met_within_a_quarter():
    hf_model = make_tiny("llama", **WIDE)
    forecast = forecast_memory(wrap(hf_model), length=LENGTH)
    hf_model.set_attn_implementation("eager")
    tokens = torch.arange(LENGTH)[None] % 64

    @torch.no_grad()
    def read():
        return hf_model.model(input_ids=tokens, use_cache=False, output_attentions=True)

    measured = measure_peak(read)
    assert measured / 1.25 < forecast.eager < measured * 1.25


@pytest.mark.parametrize("what", ["read", "steer", "generate"])
def test_fitting_batch_is_the_largest(what):
    model = wrap(make_tiny("llama"))
    for memory in (300_000, 1_000_000, 7_654_321):
        batch, rest = divmod(fit_batch_tokens(model, memory, 50, what=what), 50)
        assert rest == 0
        assert forecast_memory(model, length=50, batch=batch, what=what).run <= memory
        assert forecast_memory(model, length=50, batch=batch + 1, what=what).run > memory


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"one conversation of 100000 tokens needs about 0.\d+ GB"):
        fit_batch_tokens(wrap(make_tiny("llama")), 1_000_000, 100_000)


def test_free_memory_of_this_machine():
    assert 0 < free_memory("cpu") < 2**50


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"what": "train"}, "unknown task 'train'"),
        ({"length": 0}, "length 0"),
        ({"batch": 0}, "batch 0"),
        ({"queries": -1}, "queries -1"),
        ({"layers": [3]}, "layer 3 does not exist: the model has layers 0 to 2"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    with pytest.raises(InputError, match=words):
        forecast_memory(wrap(make_tiny("llama")), **{"length": 10, **change})


RESIDENT_SET = """
import json, sys, torch, transformers
sys.path.insert(0, {tests!r})
from types import SimpleNamespace
from tiny_models import make_chat
from ctxlens.models.backends.protocol import TokenBatch
from ctxlens.models.memory import forecast_memory
from ctxlens.models.backends.native import NativeBackend

def read(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
)
backend = NativeBackend(transformers.AutoModelForCausalLM.from_config(config).eval())
def run(length):
    batch = TokenBatch.from_chats([make_chat(length)], pad_id=0, side="right")
    backend.read_shares(batch, range(8), torch.tensor([[length - 1]]), ())
run(64)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts here
before = read("VmRSS:")
run(2048)
forecast = forecast_memory(SimpleNamespace(backend=backend), length=2048)
print(json.dumps({{"measured": read("VmHWM:") - before, "forecast": forecast.run}}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident set from /proc")
def test_resident_set_of_a_read_out_at_2048_tokens():
    code = RESIDENT_SET.format(tests=str(Path(__file__).parent))
    # glibc then gives back what is freed, instead of keeping it for later use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["measured"] / 1.25 < got["forecast"] < got["measured"] * 1.25, got
