"""Whatever a row holds, it is kept or skipped with a reason; the counts are printed with `pytest -s`."""

import json
import os
from collections import Counter

from chat_cases import byte_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row_cases import SEEDS, TEMPLATES, spoiled_rows

from ctxlens.chat.data import fingerprint_conversations, load_conversations, write_conversations
from ctxlens.chat.roles import render, render_plain
from ctxlens.errors import InputError
from ctxlens.scoring.shard import Settings, score_shard
from ctxlens.sft import build_rows

EXAMPLES = int(os.environ.get("CTXLENS_EXAMPLES", "500")) // 25
TOKENIZERS = {name: byte_tokenizer() for name in TEMPLATES}
for _name, _tokenizer in TOKENIZERS.items():
    _tokenizer.chat_template = TEMPLATES[_name]


def is_sentence(text):
    return bool(text.strip()) and text.encode("utf-8") is not None and "Traceback" not in text


def test_every_row_is_kept_or_skipped_with_a_reason(tmp_path):
    seen = Counter()
    path = tmp_path / "rows.jsonl"

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data(), st.sampled_from(sorted(SEEDS)), st.sampled_from(sorted(TEMPLATES)))
    def check(data, layout, name):
        rows = [SEEDS[layout][0], *data.draw(st.lists(spoiled_rows(layout), min_size=1, max_size=6))]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        found = load_conversations(path, layout=layout)
        assert len(found) + len(found.skipped) == len(rows)
        assert all(is_sentence(reason) and is_sentence(identity) for identity, reason in found.skipped)
        assert len({conversation.id for conversation in found}) == len(found)
        seen.update(rows=len(rows), read=len(found), skipped=len(found.skipped))
        check_use(found, TOKENIZERS[name], tmp_path, seen)

    check()
    print(f"\n{EXAMPLES} data sets: {dict(seen)}")
    assert seen["read"] > seen["rows"] // 25
    assert seen["skipped"] > seen["rows"] // 25
    assert seen["trained"] > seen["rows"] // 25


def check_use(found, tokenizer, tmp_path, seen):
    """What verbs do with conversations: render with and without template, score, train, identify, write."""
    for conversation in found:
        render_plain(tokenizer, conversation.messages).text.encode()
    scored = score_shard(Recorder(tokenizer), list(found), Settings((0,), 4096, 4096))
    refused = scored.meta["skipped"]
    assert all(is_sentence(reason) for _, reason in refused)
    assert len(set(scored.turns["conversation"].to_pylist())) + len(refused) == len(found)
    seen.update(scored=len(found) - len(refused), refused_in_scoring=len(refused))
    try:
        rows = build_rows(tokenizer, found, unusable="skip")
    except InputError:  # none of them can be trained on
        seen["untrainable data sets"] += 1
    else:
        counts = rows.counts
        parts = ("conversations", "skipped", "conversations_without_loss")
        assert sum(counts[part] for part in parts) == len(found)
        seen.update(trained=counts["conversations"], refused_in_training=counts["skipped"])
        seen.update({part: counts[part] for part in ("answers_without_loss", "conversations_without_loss")})
    assert len(fingerprint_conversations(found)) == 32
    write_conversations(tmp_path / "out.jsonl", found)


class Recorder:
    """A model that renders conversations and scores none of them."""

    name, identity, n_layers, n_ctx = "recorder", {"name": "recorder"}, 1, 4096

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def render(self, messages, **options):
        return render(self.tokenizer, messages, **options)

    def reduce_responses(self, chats, reduce, *, layers, batch_tokens):
        import numpy as np

        from ctxlens.scoring.measure import VALUES

        return [{turn: np.zeros((1, len(VALUES)), "f4") for turn in chat.response_turns()} for chat in chats]
