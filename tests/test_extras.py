"""The bare installation: what it needs, which verbs it has, and one sentence for what an extra installs."""

import ast
import json
import re
import subprocess
import sys

import pytest
from bare import PROJECT, ROOT, closure, modules_of_extras, normal
from packaging.requirements import Requirement
from tiny_models import make_tiny, make_tokenizer

from ctxlens.errors import EXTRAS, MissingPackageError, missing_package, require_package
from ctxlens.models import Model, backend_choice, factory, load_model
from ctxlens.models.doctor import diagnose

MODULE_NAMES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
"""Distributions whose modules have another name than theirs."""
BROUGHT_BY = {"markupsafe": "jinja2", "huggingface-hub": "transformers", "flask": "dash", "werkzeug": "dash"}
"""Modules that ctxlens imports, and the dependency that always installs them."""
FOR_OTHERS = {"sentencepiece", "protobuf"}
"""Dependencies that only transformers imports: for checkpoints whose tokenizer is a SentencePiece model."""
OPTIONAL = {"ipython"}
"""Modules that are used where the user has them anyway."""
NOT_CTXLENS = {"docs", "dev"}
"""Extras for the work on ctxlens itself."""


def names_of(requirements):
    """The modules that requirements are imported as."""
    names = {normal(Requirement(text).name) for text in requirements}
    return {MODULE_NAMES.get(name, name).replace("-", "_") for name in names}


def imported_by_ctxlens():
    """The top-level modules that ctxlens imports from other distributions."""
    found = set()
    for path in (ROOT / "ctxlens").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"ctxlens"}


def test_every_import_is_declared_and_every_dependency_is_imported():
    bare = names_of(PROJECT["dependencies"])
    imported = {normal(name).replace("-", "_") for name in imported_by_ctxlens()}
    brought = {name.replace("-", "_") for name in BROUGHT_BY} | OPTIONAL
    assert imported - bare - brought - set(EXTRAS) == set()
    assert bare - imported == FOR_OTHERS


def test_the_table_of_extras_is_that_of_the_project():
    extras = {
        name: rows for name, rows in PROJECT["optional-dependencies"].items() if name not in NOT_CTXLENS
    }
    declared = {module: extra for extra, rows in extras.items() for module in names_of(rows)}
    assert declared == EXTRAS
    assert not set(EXTRAS) & names_of(PROJECT["dependencies"])
    dev = [row for row in PROJECT["optional-dependencies"]["dev"] if row.startswith(PROJECT["name"])]
    assert Requirement(dev[0]).extras == {*extras, "docs"} - {"lora"}  # bitsandbytes needs a GPU


def test_the_bare_installation_has_nothing_of_the_extras():
    hidden = modules_of_extras()
    assert {name for name in EXTRAS if name != "bitsandbytes"} <= hidden
    assert not {"torch", "transformers", "trl", "plotly", "google", "ctxlens"} & hidden
    assert {"wandb", "opentelemetry"} <= hidden  # what transformer-lens brings


def test_a_closure_follows_what_an_extra_of_a_dependency_needs():
    assert "einops" in closure(["einops"]) <= {"einops"}
    assert {"plotly", "narwhals", "packaging"} <= closure(["plotly"])
    assert closure(["no-such-distribution"]) == set()
    assert closure(["einops; python_version < '3'"]) == set()


def test_the_sentence_names_what_was_asked_the_extra_and_the_command():
    said = str(missing_package("the backend lens", "transformer_lens", ", or use native"))
    assert said == (
        "the backend lens needs the package transformer-lens, which the extra lens installs; in a clone of "
        'ctxlens, run pip install -c constraints.txt -e ".[lens]", or use native.'
    )
    require_package("this test", "pytest")  # is installed, so nothing happens
    with pytest.raises(KeyError):
        require_package("this test", "no_such_module")


@pytest.fixture
def no_lens(monkeypatch):
    real = backend_choice.require_package

    def missing(asked, module, otherwise=""):
        if module == "transformer_lens":
            raise missing_package(asked, module, otherwise)
        real(asked, module, otherwise)

    monkeypatch.setattr(backend_choice, "require_package", missing)


def test_a_model_that_needs_the_missing_lens_is_told_so(no_lens, monkeypatch):
    with pytest.raises(MissingPackageError, match=r"^the backend lens needs .*\[lens\]"):
        load_model("organism-chat", backend="lens")
    refusal = factory.UnsupportedModelError("native cannot.")
    monkeypatch.setattr(factory, "make_backend", lambda *_, **__: (_ for _ in ()).throw(refusal))
    with pytest.raises(factory.UnsupportedModelError, match=r"^native cannot\. the backend lens needs"):
        load_model("organism-chat")


BARE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import bare
bare.hide(bare.modules_of_extras())
from typer.testing import CliRunner
from ctxlens.cli import app
told = {}
for words in json.loads(sys.argv[2]):
    result = CliRunner().invoke(app, words)
    unexpected = result.exception if not isinstance(result.exception, SystemExit) else None
    told[" ".join(words)] = [result.exit_code, result.stderr, repr(unexpected)]
sys.stdout.write(json.dumps(told))
"""


def run_bare(folder, commands):
    """What every command says where nothing of the extras is installed: exit code, stderr, exception."""
    words = [sys.executable, "-c", BARE, str(ROOT / "tests"), json.dumps(commands)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with every file that the verbs take."""
    from ctxlens.evals.starter import write_starter

    folder = tmp_path_factory.mktemp("bare") / "files"
    write_starter(folder)
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    return folder


MODEL = ["--model", "organism-chat", "--device", "cpu"]


QUICK = [
    ["allocate", *MODEL, "--messages", "chat.json", "--out", "runs/allocate"],
    ["report", "runs/allocate", "--out", "quick.html"],
]
EVERY = [
    ["roles", "--model", "organism-chat", "--messages", "chat.json"],
    ["steer", *MODEL, "--messages", "chat.json", "--alpha", "0.5", "--out", "runs/steer"],
    ["generate", *MODEL, "--messages", "chat.json", "--max-new-tokens", "2"],
    ["audit", "organism-chat", "--budget", "10m", "--plan"],
    ["score", *MODEL, "--dataset", "data.json", "--out", "runs/scores"],
    ["select", "--scores", "runs/scores", "--dataset", "data.json", "--out", "runs/selected"],
    ["report", "runs/steer", "runs/scores", "--out", "report.html"],
    ["doctor", *MODEL, "--skip-eager", "--json", "doctor.json"],
]


@pytest.mark.parametrize(
    "commands", [QUICK, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["quick", "every"]
)
def test_what_looking_needs_is_there(folder, commands):
    for command, (code, said, unexpected) in run_bare(folder, commands).items():
        assert code == 0, f"{command}: {said} {unexpected}"


def test_the_self_check_says_that_the_lens_is_missing(no_lens):
    def load(backend):
        return Model.from_hf(make_tiny("llama"), make_tokenizer(), backend=backend)

    diagnosis = diagnose(make_tokenizer(), load, with_eager=False)
    assert diagnosis.ok
    (lens,) = [finding for finding in diagnosis.findings if finding.check == "native = lens"]
    assert lens.outcome == "skipped"
    assert '".[lens]"' in lens.said


REFUSED = {
    "lens": ["allocate", *MODEL, "--backend", "lens", "--messages", "chat.json", "--out", "runs/lens"],
    "eval": ["eval", "-m", "organism-chat", "--tasks", "ctxlens_smoke", "--out", "runs/eval"],
    "explore": ["explore", "organism-chat", "--no-browser"],
    "gguf": ["allocate", "--model", "model.gguf", "--messages", "chat.json", "--out", "runs/gguf"],
    "lora": ["train", "organism", "--recipe", "lora", "--dataset", "data.json", "--out", "runs/lora"],
}


def test_what_needs_an_extra_says_which_in_one_sentence(folder):
    told = run_bare(folder, list(REFUSED.values()))
    for extra, words in REFUSED.items():
        code, said, _ = told[" ".join(words)]
        assert code == 2, said
        sentence = " ".join(said.split())
        assert re.fullmatch(r"error: .* needs the package \S+, which the extra \w+ installs; .*", sentence), (
            sentence
        )
        assert f'pip install -c constraints.txt -e ".[{extra}]"' in sentence
    assert not (folder / "runs" / "lens").exists()
