"""lm-eval on our models: the same bits per byte, answers that do not depend on the batch, and no network."""

import math
import socket
import sys

import pytest
import torch

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.data import ByteTokenizer
from hybrid_lm.eval.language import evaluate_text, windows
from hybrid_lm.eval.tasks import NAME, name_questions, task_names, write_tasks
from hybrid_lm.model.build import build_model

# Warnings of lm_eval's and datasets' own imports are theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

EPS = torch.finfo(torch.float32).eps
TOKENIZER = ByteTokenizer()
WORDS = ["import", "return", "values", "letter", "number", "garden", "window"]
TEXTS = [
    "".join(f"{WORDS[(i * i + j) % 7]} = {WORDS[(i + 3 * j) % 7]}\n" for i in range(25)) + "é"
    for j in range(3)
]
LAYERS = {
    "m": {"type": "mamba2", "d_state": 8, "head_dim": 16, "chunk": 16},
    "s": {"type": "mamba", "d_state": 4},
    "a": {"type": "attention", "n_heads": 2, "rope": {}},
    "c": {"type": "short_conv"},
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection was attempted: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def model():
    config = {"d_model": 32, "pattern": "m a s c", "layers": LAYERS, "vocab_size": 258, "init": {"std": 0.5}}
    return build_model(ModelConfig.model_validate(config), seed=3)


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    """Results of both local tasks, and the folder that they were made in."""
    from hybrid_lm.eval.harness import run_tasks

    folder = tmp_path_factory.mktemp("tasks") / "a folder: with 'odd' characters"
    tasks = write_tasks(TEXTS, folder, context=120, n_questions=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        return run_tasks(model, TOKENIZER, tasks, max_length=200, include_path=folder), folder


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def harness_model(model, batch_size, max_length=200):
    from hybrid_lm.eval.adapter import HarnessModel

    return HarnessModel(model, TOKENIZER, max_length=max_length, batch_size=batch_size)


def test_nothing_is_imported_before_it_is_needed():
    import subprocess

    code = "import hybrid_lm.eval.run, hybrid_lm.eval.report, sys; print([m for m in sys.modules if m in "
    code += "('lm_eval', 'transformers', 'matplotlib', 'datasets')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_asked_of_git_and_nothing_is_said(model, tmp_path, monkeypatch, capfd):
    import subprocess

    from hybrid_lm.eval.harness import run_tasks

    def refuse(*args, **kwargs):
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    write_tasks(TEXTS, tmp_path / "tasks", context=120, n_questions=2)
    run_tasks(model, TOKENIZER, ["hybrid_lm_names"], max_length=200, include_path=tmp_path / "tasks")
    assert capfd.readouterr().err == ""


def test_bits_per_byte_are_the_harnesss(model, found):
    results, _ = found
    ours = evaluate_text(model, TEXTS, TOKENIZER, seq_len=200, stride=200)
    theirs = results["results"]["hybrid_lm_text"]["bits_per_byte,none"]
    # Each token's loss, below 32 nats here, is rounded to float32 in batches of other shapes.
    assert abs(ours.bits_per_byte - theirs) <= 32 * EPS / math.log(2) * ours.n_tokens / ours.n_bytes
    assert len(TEXTS[0].encode()) > 200, "more than one window"


def test_windows_are_the_harnesss_for_every_stride():
    from lm_eval.utils import get_rolling_token_windows

    for n in (0, 1, 7, 8, 9, 30):
        for seq_len in (1, 5, 8):
            for stride in range(1, seq_len + 1):
                stream = [0, *range(1, n + 1)]
                ours = [(stream[b:e], stream[d + 1 : e + 1]) for b, d, e in windows(n, seq_len, stride)]
                theirs = get_rolling_token_windows(stream[1:], 0, seq_len, seq_len - stride + 1)
                assert ours == list(theirs)


def test_questions_are_answered_and_kept_for_pairing(model, found):
    results, folder = found
    assert sorted(results["results"]) == sorted(results["samples"]) == task_names()
    samples = results["samples"]["hybrid_lm_names"]
    assert len({sample["hash"] for sample in samples}) == len(samples) == 30
    right = [sample["metrics"]["acc"] for sample in samples]
    assert results["results"]["hybrid_lm_names"]["acc,none"] == sum(right) / len(right)
    # The answers again, by the definition: the choice with the largest sum of log p.
    for question, answer in zip(name_questions(TEXTS, context=120, n=30), right, strict=True):
        sums = [logp(model, question["context"], choice) for choice in question["choices"]]
        assert (max(range(4), key=sums.__getitem__) == question["answer"]) == bool(answer)
    assert (folder / "cache").is_dir()


@torch.no_grad()
def logp(model, context, continuation):
    tokens = torch.tensor([[*context.encode(), *continuation.encode()]])
    n = len(continuation.encode())
    table = model(tokens[:, :-1]).logits[0, -n:].double().log_softmax(-1)
    return table.gather(-1, tokens[0, -n:, None]).sum().item()


def test_left_padding_changes_no_generation(model):
    prompts = [TEXTS[i % 3][: 3 + 11 * i] for i in range(9)] + [""]
    asked = requests("generate_until", [(p, {"until": ["\n"], "max_gen_toks": 12}) for p in prompts])
    alone, together = (harness_model(model, b).generate_until(asked) for b in (1, 8))
    assert alone == together
    assert len(set(alone)) > 3, "the prompts matter"


def test_likelihoods_do_not_depend_on_the_batch(model):
    pairs = [(TEXTS[i % 3][: 7 * i], TEXTS[i % 3][7 * i : 7 * i + 1 + i % 4]) for i in range(12)]
    asked = requests("loglikelihood", pairs)
    alone, together = (harness_model(model, b).loglikelihood(asked) for b in (1, 8))
    for (a, greedy_a), (b, greedy_b), (_, continuation) in zip(alone, together, pairs, strict=True):
        # Each token's loss, below 32 nats here, is rounded to float32.
        assert abs(a - b) <= 32 * EPS * len(continuation.encode())
        assert greedy_a == greedy_b
    # The first context is empty: an end-of-text token stands for it, and lm-eval calls that greedy or not.
    assert not all(greedy for _, greedy in alone)


def test_stop_strings_end_an_answer(model):
    prompt = TEXTS[0][:40]
    (free,) = harness_model(model, 1).generate_until(
        requests("generate_until", [(prompt, {"max_gen_toks": 20})])
    )
    stop = free[5:7]
    how = {"until": stop, "max_gen_toks": 20}
    (cut,) = harness_model(model, 1).generate_until(requests("generate_until", [(prompt, how)]))
    assert cut == free[: free.index(stop)]


def test_what_does_not_fit_is_refused(model):
    lm = harness_model(model, 1, max_length=8)
    with pytest.raises(ValueError, match="continuation of 9 tokens does not fit into max_length 8"):
        lm.loglikelihood(requests("loglikelihood", [("a", "123456789")]))
    with pytest.raises(ValueError, match="max_gen_toks 8 leaves no room for a prompt in max_length 8"):
        lm.generate_until(requests("generate_until", [("a", {"max_gen_toks": 8})]))
    with pytest.raises(ValueError, match="generation_kwargs num_beams: known are do_sample"):
        lm.generate_until(requests("generate_until", [("a", {"max_gen_toks": 2, "num_beams": 3})]))


def test_an_unknown_task_is_named_with_the_nearest(model, found):
    from hybrid_lm.eval.harness import run_tasks

    with pytest.raises(ValueError, match=r"unknown task 'hybrid_lm_nams'.*Did you mean 'hybrid_lm_names'"):
        run_tasks(model, TOKENIZER, ["hybrid_lm_nams"], max_length=64, include_path=found[1])


def test_a_name_like_no_task_says_what_there_is(model, tmp_path):
    from hybrid_lm.eval.harness import run_tasks, unknown_task

    # lm-eval's own index takes seconds to read.
    said = unknown_task("nosuchtask", ["arc_easy", "hellaswag"], None)
    assert said.startswith(
        "unknown task 'nosuchtask'; made from a run's own text: hybrid_lm_names, hybrid_lm_te"
    )
    assert said.endswith("`lm-eval ls tasks` lists them")
    assert "Did you mean 'arc_easy'" in unknown_task("arc_eesy", ["arc_easy", "hellaswag"], None)
    with pytest.raises(ValueError, match=rf"^unknown task 'x': {tmp_path} has no task files$"):
        run_tasks(model, TOKENIZER, ["x"], max_length=64, include_path=tmp_path)
    with pytest.raises(ValueError, match=r"^limit 0: must be at least 1$"):
        run_tasks(model, TOKENIZER, ["x"], max_length=64, limit=0)


def test_questions_can_be_answered_from_their_context():
    questions = list(name_questions(TEXTS, context=120, n=40))
    assert questions == list(name_questions(TEXTS, context=120, n=40))
    assert len(questions) == 40
    for question in questions:
        assert len(question["context"]) <= 120
        assert len(set(question["choices"])) == 4
        assert set(question["choices"]) <= set(NAME.findall(question["context"]))
        whole = next(
            text for text in TEXTS if question["context"] + question["choices"][question["answer"]] in text
        )
        for i, choice in enumerate(question["choices"]):
            if i != question["answer"]:
                assert question["context"] + choice not in whole
    assert list(name_questions(["too short", ""])) == []


def test_a_task_without_questions_is_left_out(tmp_path):
    assert write_tasks(["no names"], tmp_path) == ["hybrid_lm_text"]
    assert not (tmp_path / "hybrid_lm_names.yaml").exists()
