"""Whom the explorer's server answers, with which headers, and what its code to copy computes."""

import base64
import json
import re

import pytest

import ctxlens as cl
from ctxlens.errors import InputError
from ctxlens.explore.copying import Source, as_command, as_python
from ctxlens.explore.lab import Lab
from ctxlens.explore.state import State

pytest.importorskip("dash")

from ctxlens.explore import chat, steer, where
from ctxlens.explore.direct import PROGRESS, ROW
from ctxlens.explore.layout import csv_of
from ctxlens.explore.server import allowed_hosts, is_local, make_app

HERE = {"Host": "127.0.0.1:8061"}
JSON = {**HERE, "Content-Type": "application/json"}
TOKEN = "a-long-token"
QUESTION = "The mayor of Oakford is Ada. Who is the mayor of Oakford?"
CHAT = {"messages": [{"role": "user", "content": QUESTION}], "answer_tokens": 6}


@pytest.fixture(scope="module")
def lab():
    model = cl.load_model("organism-chat", backend="native", device="cpu")
    options = {"backend": "native", "device": "cpu"}
    flags = ("--backend", "native", "--device", "cpu")
    return Lab(model, source=Source("organism-chat", None, options, flags), cache_bytes=2**26)


@pytest.fixture(scope="module")
def client(lab):
    return make_app(lab).server.test_client(use_cookies=False)


def run(lab, task):
    """Compute a task here and now, as the worker would."""
    lab.submit(task, page="test", slot=task.key)
    import time

    for _ in range(2000):
        if lab.look(task.which, task.key).state in ("done", "failed"):
            break
        time.sleep(0.01)
    assert lab.look(task.which, task.key).state == "done", lab.look(task.which, task.key).error
    return lab.cache.get(task.key)


class TestDoor:
    @pytest.mark.parametrize("host", ["127.0.0.1:8061", "localhost:8061", "[::1]:8061"])
    def test_its_own_names_are_answered(self, client, host):
        assert client.get("/", headers={"Host": host}).status_code == 200

    @pytest.mark.parametrize(
        "host", ["evil.example:8061", "127.0.0.1:80", "127.0.0.1", "127.0.0.1.evil.example:8061", ""]
    )
    def test_other_names_are_not(self, client, host):
        answer = client.get("/_dash-layout", headers={"Host": host})
        assert answer.status_code == 421
        assert b"messages" not in answer.data

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:9000"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ],
    )
    def test_requests_of_other_pages_are_refused(self, client, headers):
        assert (
            client.post("/_dash-update-component", data="{}", headers={**JSON, **headers}).status_code == 403
        )
        assert client.get("/_dash-layout", headers={**HERE, **headers}).status_code == 403

    def test_a_link_elsewhere_may_lead_to_the_page_itself(self, client):
        assert client.get("/", headers={**HERE, "Sec-Fetch-Site": "cross-site"}).status_code == 200

    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
    )
    def test_only_json_is_taken(self, client, kind):
        answer = client.post("/_dash-update-component", data="{}", headers={**HERE, "Content-Type": kind})
        assert answer.status_code == 415

    @pytest.mark.parametrize("method", ["put", "delete", "patch"])
    def test_other_methods_are_refused(self, client, method):
        assert getattr(client, method)("/", headers=HERE).status_code == 405

    def test_large_requests_are_refused(self, client):
        answer = client.post("/_dash-update-component", data=b" " * (9 * 2**20), headers=JSON)
        assert answer.status_code == 413

    @pytest.mark.parametrize(
        "path",
        ["/assets/../state.py", "/assets/%2e%2e/state.py", "/assets/..%2fstate.py", "/assets//etc/passwd",
         "/_dash-component-suites/dash/../../../etc/passwd", "/static/../server.py"],
    )  # fmt: skip
    def test_no_other_file_is_served(self, client, path):
        answer = client.get(path, headers=HERE)
        assert b"def " not in answer.data
        assert b"root:" not in answer.data

    def test_the_headers_are_strict(self, client):
        answer = client.get("/", headers=HERE)
        policy = answer.headers["Content-Security-Policy"]
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        assert rules["default-src"] == "'none'"
        assert rules["connect-src"] == "'self'"
        assert re.fullmatch(r"'self'( 'sha256-[\w+/=]+')+", rules["script-src"])
        assert "http" not in policy
        assert rules["frame-ancestors"] == "'none'"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"

    def test_nothing_on_the_page_comes_from_elsewhere(self, client):
        page = client.get("/", headers=HERE).get_data(as_text=True)
        assert re.findall(r'(?:src|href)="(?!/)', page) == []

    def test_unexpected_json_is_no_traceback(self, client):
        answer = client.post("/_dash-update-component", data='{"output": "x"}', headers=JSON)
        assert answer.status_code >= 400
        assert b"Traceback" not in answer.data


class TestWhatTheScriptAsks:
    """Rows of attention and the progress of computations, which do not pass through Dash."""

    def ask(self, client, path, question, **headers):
        return client.post(path, data=json.dumps(question), headers={**JSON, **headers})

    def question(self, **look):
        chosen = State.read({"chat": CHAT, "where": look})
        return {"conversation": chosen.model_dump()["chat"], "look": chosen.model_dump()["where"]}

    def test_a_row_and_the_tokens_that_hold_most_of_it(self, lab, client):
        rows = run(lab, lab.reading(State.read({"chat": CHAT}).chat))
        asked = self.question(layer=2, head=1, query=9)
        found = self.ask(client, ROW, asked).get_json()
        row = rows.row(2, 1, 9)
        assert found["row"]["weights"] == pytest.approx(row.tolist(), abs=1e-5)
        assert (found["row"]["layer"], found["row"]["query"], found["row"]["isBest"]) == (2, 9, False)
        positions = [position for position, _ in found["mass"]]
        assert row[positions].sum() > 0.8 * row.sum() > row[positions[:-1]].sum()
        assert found["most"] == len(positions)

    def test_without_a_chosen_head_it_is_the_strongest(self, lab, client):
        rows = run(lab, lab.reading(State.read({"chat": CHAT}).chat))
        found = self.ask(client, ROW, self.question(view="raw")).get_json()["row"]
        share = rows.allocation(rows.chat.n_tokens - 1).share("user", view="raw")[..., 0]
        assert share[found["layer"], found["head"]] == share.max()
        assert found["isBest"]

    def test_a_row_that_takes_a_forward_pass_is_waited_for(self, client):
        lab = Lab(cl.load_model("organism-chat", backend="lens", device="cpu"))
        other = make_app(lab).server.test_client(use_cookies=False)
        asked = {**self.question(layer=1, head=0, query=5), "page": "me"}
        want = self.ask(other, ROW, asked).get_json()["wanted"]
        progress = {"wanted": [want]}
        while not (found := self.ask(other, PROGRESS, progress).get_json())["found"][0]["over"]:
            assert found["words"]
        assert found["found"] == [{"over": True, "state": "done", "error": None, "partial": ""}]
        row = self.ask(other, ROW, asked).get_json()["row"]["weights"]
        native = self.ask(client, ROW, asked).get_json()["row"]["weights"]
        assert row == pytest.approx(native, abs=1e-4)

    def test_what_cannot_be_is_a_sentence(self, client):
        assert (
            "head 9.0 does not exist"
            in self.ask(client, ROW, self.question(layer=9, head=0)).get_json()["error"]
        )
        for path, question, words in (
            (ROW, None, "the state: input should be a valid dictionary"),
            (ROW, {"look": {}}, "conversation: field required"),
            (PROGRESS, {"wanted": [{"which": "this"}]}, "wanted.0.key: field required"),
            (PROGRESS, {"wanted": [{"which": "../", "key": "a"}]}, "there is no second model"),
        ):
            assert words in self.ask(client, path, question).get_json()["error"]
        unknown = self.ask(client, PROGRESS, {"wanted": [{"which": "this", "key": "a"}]}).get_json()
        assert unknown["found"][0]["state"] == "unknown"

    def test_the_door_is_the_same(self, client):
        for path in (ROW, PROGRESS):
            assert self.ask(client, path, {}, Origin="https://evil.example").status_code == 403
            assert self.ask(client, path, {}, Host="evil.example:8061").status_code == 421


class TestNotebook:
    def test_it_shows_what_the_page_shows_and_runs_nothing(self, lab):
        from ctxlens.explore import notebook_view

        rows = run(lab, lab.reading(State.read({"chat": CHAT}).chat))
        shown = notebook_view(lab.model, CHAT["messages"], layer=2, head=1, query=9)._repr_html_()
        row = rows.row(2, 1, 9)
        assert "Layer 2, head 1, attention from token 9" in shown
        assert f"attention {row.max():.4f}" in shown
        share = float(rows.allocation(9).share("user", view="without sinks")[2, 1, 0])
        assert f'title="layer 2, head 1: {share:.1%}"' in shown
        assert "<script" not in shown

    def test_the_strongest_head_and_what_does_not_exist(self, lab):
        from ctxlens.explore import notebook_view

        payload = "<img src=x onerror=alert(1)>"
        shown = notebook_view(lab.model, [{"role": "user", "content": payload}], view="raw").page()
        assert "<img" not in shown
        assert shown.count('class="here"') == 1
        with pytest.raises(InputError, match="layer 9 is not among the layers"):
            notebook_view(lab.model, CHAT["messages"], layer=9)


class TestToken:
    @pytest.fixture(scope="class")
    def outside(self, lab):
        return make_app(lab, host="192.0.2.7", port=8061, token=TOKEN).server

    def test_another_address_needs_one(self, lab):
        with pytest.raises(
            InputError, match=r"192\.0\.2\.7 can be reached by others, so the page needs a token"
        ):
            make_app(lab, host="192.0.2.7")

    def test_without_it_nothing_is_answered(self, outside):
        client = outside.test_client()
        for path in (
            "/",
            "/?token=wrong",
            "/_dash-layout",
            "/assets/explore.js",
            "/_dash-layout?token=" + TOKEN,
        ):
            assert client.get(path, headers={"Host": "192.0.2.7:8061"}).status_code == 403
        assert client.get(f"/?token={TOKEN}", headers={"Host": "127.0.0.1:8061"}).status_code == 421

    def test_the_link_is_exchanged_for_a_cookie(self, outside):
        client, host = outside.test_client(), {"Host": "192.0.2.7:8061"}
        first = client.get(f"/?token={TOKEN}", headers=host, base_url="http://192.0.2.7:8061")
        assert (first.status_code, first.headers["Location"]) == (302, "/")
        assert "HttpOnly" in first.headers["Set-Cookie"]
        assert "SameSite=Strict" in first.headers["Set-Cookie"]
        assert TOKEN not in first.headers["Set-Cookie"]
        assert client.get("/", headers=host, base_url="http://192.0.2.7:8061").status_code == 200

    def test_which_addresses_are_local(self):
        assert all(map(is_local, ("127.0.0.1", "localhost", "::1")))
        assert not any(map(is_local, ("0.0.0.0", "192.168.0.2", "box")))
        assert allowed_hosts("::1", 9) == allowed_hosts("127.0.0.1", 9)
        assert allowed_hosts("box", 9) == {"box:9"}

    def test_on_all_addresses_only_numbers_count(self, lab):
        client = make_app(lab, host="0.0.0.0", port=8061, token=TOKEN).server.test_client()
        assert client.get("/", headers={"Host": "192.168.0.2:8061"}).status_code == 403
        assert client.get("/", headers={"Host": "192.168.0.2:8062"}).status_code == 421
        assert client.get("/", headers={"Host": "evil.example:8061"}).status_code == 421


class TestCode:
    """What is copied is run, and gives what the page shows."""

    def state(self, screen, **groups):
        return State.read({"screen": screen, "chat": CHAT, **groups})

    def run_python(self, lab, state):
        found = {}
        exec(as_python(lab, state), found)
        return found

    def test_chat(self, lab):
        state = self.state("chat")
        found = self.run_python(lab, state)
        rows = run(lab, lab.reading(state.chat))
        shown = rows.allocation(rows.chat.first_answer_position())
        assert found["shares"].shares == pytest.approx(shown.shares, abs=1e-5)
        assert found["answer"] == run(lab, lab.answer(state.chat))

    def test_a_finished_conversation_is_read_whole_and_answered_again(self, lab):
        messages = [*CHAT["messages"], {"role": "assistant", "content": "It is Ada."}]
        state = State.read({"chat": {**CHAT, "messages": messages, "template": "none"}})
        found = self.run_python(lab, state)
        rows = run(lab, lab.reading(state.chat))
        assert found["chat"].tokens.tolist() == rows.chat.tokens.tolist()
        assert found["shares"].shares == pytest.approx(
            rows.allocation(rows.chat.first_answer_position()).shares, abs=1e-5
        )
        assert found["answer"] == run(lab, lab.answer(state.chat))

    def test_where(self, lab):
        state = self.state("where", where={"role": "user", "layer": 2, "head": 1, "query": 9, "view": "raw"})
        found = self.run_python(lab, state)
        rows = run(lab, lab.reading(state.chat))
        assert found["row"] == pytest.approx(rows.row(2, 1, 9), abs=1e-5)
        assert found["figure"].data[0].z

    @pytest.mark.parametrize("heads", ["all", "retrieval", "random", "chosen"])
    def test_steer(self, lab, heads):
        steer = {"alpha": 0.2, "heads": heads, "chosen": "1.2,3.0", "phrase": "Ada is the mayor"}
        state = self.state("steer", steer=steer)
        found = self.run_python(lab, state)
        assert found["unsteered"] == run(lab, lab.answer(state.chat))
        assert found["steered"] == run(lab, lab.answer(state.chat, steer=state.steer))
        measured = run(lab, lab.phrase(state.chat, state.steer))
        assert found["plain_logprob"] == pytest.approx(measured.plain, abs=1e-4)
        assert found["steered_logprob"] == pytest.approx(measured.steered, abs=1e-4)
        assert (measured.control is None) == (heads == "all")

    def test_compare(self, lab):
        state = self.state("compare", compare={"template": "none", "view": "raw"})
        found = self.run_python(lab, state)
        changed, which = lab.side(state.chat, state.compare)
        rows = run(lab, lab.reading(changed, which, is_open=True))
        assert found["shares_b"].shares == pytest.approx(
            rows.allocation(rows.chat.n_tokens - 1).shares, abs=1e-5
        )
        assert found["answer_b"] == run(lab, lab.answer(changed, which))

    def test_messages_with_quotes_and_markup_stay_text(self, lab):
        content = "'''\"\"\" \\n $(touch x) `id` END_OF_TEXT\nEND_OF_TEXT\n</script>"
        state = State.read({"chat": {"messages": [{"role": "user", "content": content}]}})
        found = {}
        exec(re.sub(r"model = .*\n", "", as_python(lab, state).split("chat = ")[0]), found)
        assert found["messages"] == [{"role": "user", "content": content}]
        lines = as_command(lab, state).split("\n")
        assert json.loads(lines[1]) == found["messages"]
        assert lines[2] == "END_OF_TEXT"

    def test_commands_give_what_the_page_shows(self, lab, tmp_path):
        import shutil
        import subprocess
        import sys

        if shutil.which("bash") is None:
            pytest.skip("needs bash")
        state = self.state("steer", steer={"alpha": 0.2, "heads": "chosen", "chosen": "1.2,3.0"})
        command = as_command(lab, state).replace(
            "ctxlens steer", f"{sys.executable} -m ctxlens steer --json", 1
        )
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        answers = json.loads(next((tmp_path / "runs").glob("*/steer.json")).read_text())["answers"][0]
        assert answers["unsteered"] == run(lab, lab.answer(state.chat))
        assert answers["steered"] == run(lab, lab.answer(state.chat, steer=state.steer))


class TestWhatIsLoaded:
    def upload(self, raw, name="chat.json"):
        return chat.read_upload("data:application/json;base64," + base64.b64encode(raw).decode(), name)

    def test_messages_of_json_and_json_lines(self):
        asked = [{"role": "user", "content": "Hello"}]
        assert self.upload(json.dumps(asked).encode()) == asked
        rows = json.dumps({"messages": asked}) + "\n" + json.dumps({"messages": []})
        assert self.upload(rows.encode(), "CHATS.JSONL") == asked

    @pytest.mark.parametrize(
        ("raw", "name", "words"),
        [
            (b"\x80\x04N.", "chat.pkl", r"chat\.pkl is not a JSON file; load a file that ends with \.json"),
            (b"\x80\x04N.", "chat.json", r"chat\.json is not JSON; expected a list of messages"),
            (b"PAR1 and more PAR1", "chat.json", "is not JSON"),
            (b"", "chat.json", "is not JSON"),
            (b"[", "chat.json", "chat.json"),
            (b"[" * 100_000, "chat.json", "chat.json"),
            (b'[{"role": "user", "content": 3}]', "../../etc/passwd.json", "content"),
        ],
    )
    def test_anything_else_is_refused_in_one_sentence(self, raw, name, words):
        with pytest.raises(InputError, match=words) as raised:
            self.upload(raw, name)
        assert len(str(raised.value)) < 600

    def test_large_files_and_broken_uploads_are_refused(self):
        with pytest.raises(InputError, match="has more than 4 MiB"):
            self.upload(b"[" + b" " * (5 * 2**20))
        with pytest.raises(InputError, match="did not arrive whole"):
            chat.read_upload("data:,%%%", "chat.json")


def test_the_strip_says_in_words_what_it_shows(lab):
    rows = run(lab, lab.reading(State.read({"chat": CHAT}).chat))
    allocation = rows.allocation(rows.chat.n_tokens - 1)
    pieces, words = chat.strip(allocation, "raw")
    share = float(allocation.share("user").mean())
    assert f"user {share:.1%}" in words
    assert pieces[0].children.children == f"user {share:.0%}"


def test_words_that_differ_are_marked():
    shown = steer.mark_words("to paint red doors.", "to paint blue doors.")
    assert [getattr(piece, "children", piece) for piece in shown] == ["to paint ", "red ", "doors."]
    assert type(shown[1]).__name__ == "Mark"
    assert steer.mark_words("same words", "same words") == ["same words"]


def test_a_table_of_every_figure(lab):
    state = State.read({"chat": CHAT})
    with pytest.raises(InputError, match="the two sides have not been read yet"):
        csv_of(Lab(lab.model), "difference", state)
    run(lab, lab.reading(state.chat))
    lines = csv_of(lab, "map", state).splitlines()
    assert lines[0] == "layer,head,query,role,share,resting"
    assert len(lines) == 1 + lab.model.n_layers * lab.model.n_heads * 9
    with pytest.raises(InputError, match="there is no table for '<b>'"):
        csv_of(lab, "<b>", state)


def test_heads_that_do_not_exist_and_conversations_that_cannot_be_read(lab):
    with pytest.raises(InputError, match="write a message to begin"):
        lab.render(State().chat)
    with pytest.raises(InputError, match=r"head 9\.0 does not exist"):
        where.check_head(lab, State.read({"where": {"layer": 9, "head": 0}}).where)
    with pytest.raises(InputError, match=r"start the explorer with --against MODEL"):
        lab.reading(State.read({"chat": CHAT}).chat, "other")
    with pytest.raises(InputError, match="paste a chat template"):
        lab.render(State.read({"chat": {**CHAT, "template": "own"}}).chat)


class TestCommand:
    @pytest.fixture
    def served(self, monkeypatch):
        """What would be served; nothing is opened."""
        import ctxlens.explore.server as server

        found = {}

        class Stub:
            def serve_forever(self):
                raise KeyboardInterrupt

            def server_close(self):
                found["closed"] = True

        def bind(app, host, port):
            found.update(app=app, host=host, port=port)
            return Stub()

        monkeypatch.setattr(server, "bind", bind)
        monkeypatch.setattr("webbrowser.open", lambda link: found.update(opened=link))
        return found

    def call(self, *words):
        from typer.testing import CliRunner

        from ctxlens.cli import app

        return CliRunner().invoke(app, ["explore", *words])

    def test_it_prints_the_link_and_opens_it(self, served):
        done = self.call("organism-chat", "--device", "cpu", "--port", "8123")
        assert done.exit_code == 0, done.output
        assert served["opened"] == "http://127.0.0.1:8123/"
        assert "http://127.0.0.1:8123/" in done.output
        assert served["closed"]

    def test_another_address_gets_a_token_and_an_unknown_model_a_sentence(self, served):
        done = self.call("organism-chat", "--device", "cpu", "--host", "192.0.2.7", "--no-browser")
        assert re.search(r"http://192\.0\.2\.7:8061/\?token=[\w-]{32}\s", done.output)
        assert "opened" not in served
        done = self.call("no/such/folder/here")
        assert done.exit_code == 2
        assert "Traceback" not in done.output

    def test_a_port_in_use_is_told_before_a_model_is_loaded(self, served):
        import socket

        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            done = self.call("no/such/folder/here", "--port", str(port))
            assert done.exit_code == 2
            done = self.call("organism-chat", "--device", "cpu", "--port", str(port))
        assert done.exit_code == 2
        words = " ".join(done.output.split())
        assert f"port {port} of 127.0.0.1 cannot be opened: it is in use; give another --port." in words
        assert "app" not in served

    def test_how_models_were_loaded_is_copied(self):
        from ctxlens.cli._options import Backend, Device, ModelOptions
        from ctxlens.cli.explore import source_of

        loading = ModelOptions(
            backend=Backend.native, device=Device.cpu, template_arg=["enable_thinking=false"], revision="main"
        )
        source = source_of(loading, "a/b", None)
        assert source.options == {
            "backend": "native", "device": "cpu", "revision": "main",
            "template_args": {"enable_thinking": False},
        }  # fmt: skip
        assert source.flags == (
            "--backend", "native", "--device", "cpu", "--revision", "main", "--template-arg",
            "enable_thinking=false",
        )  # fmt: skip

    @pytest.mark.parametrize("is_seen_before", [True, False])
    def test_a_base_without_a_template_is_lent_one(self, served, tmp_path, monkeypatch, is_seen_before):
        """Every screen that asks in two ways needs a template, and a base model has none."""
        import shutil

        import ctxlens.explore.server as server
        import ctxlens.models.checkpoint as checkpoint
        from ctxlens.explore.layout import first_state

        base = tmp_path / "base"
        shutil.copytree(checkpoint.locate_checkpoint("organism-chat"), base)
        (base / "chat_template.jinja").unlink()
        if not is_seen_before:  # as for a model on the Hub
            monkeypatch.setattr(checkpoint, "lacks_chat_template", lambda source: False)
        labs = []
        monkeypatch.setattr(server, "make_app", lambda lab, **options: labs.append(lab))
        done = self.call(str(base), "--against", "organism-chat", "--device", "cpu", "--no-browser")
        assert done.exit_code == 0, done.output
        assert "has no chat template" in done.output
        [lab] = labs
        state = first_state(lab)
        assert (state.chat.template, state.compare.template) == ("none", "model")
        assert "<|im_start|>user" in lab.render(state.chat.model_copy(update={"template": "model"})).text
        other = lab.models["other"]
        assert "<|im_start|>" not in other.render([{"role": "user", "content": "Hi."}]).text
        changed = state.model_copy(update={"screen": "compare"})
        assert f"cl.load_model({str(base)!r}, device='cpu', chat_template='chatml')" in as_python(
            lab, changed
        )
        assert f"{base} --device cpu --chat-template chatml" in as_command(lab, changed)
        assert "chatml" not in as_python(lab, changed.model_copy(
            update={"compare": state.compare.model_copy(update={"model": "other"})}
        )).split("other = ")[1]  # fmt: skip
