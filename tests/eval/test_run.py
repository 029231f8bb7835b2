"""Evaluating what training left behind, on models that train in a second."""

import shutil

import pytest
from rich.console import Console

from hybrid_lm.config.load import parse_config
from hybrid_lm.config.schema import TokenizerConfig
from hybrid_lm.data import prepare
from hybrid_lm.eval.compare import compare
from hybrid_lm.eval.report import report
from hybrid_lm.eval.results import read_results, read_rows
from hybrid_lm.eval.run import evaluate_run, evaluate_tasks, run_probe, steps_to
from hybrid_lm.eval.summary import read_run
from hybrid_lm.train.loop import train

CPU = {"device": "cpu"}
FAST = {**CPU, "sample_tokens": 5}
QUIET = Console(quiet=True)
LAYERS = {"a": {"type": "attention", "n_heads": 2, "rope": {}}, "c": {"type": "short_conv"}}


def text_config(path, pattern, **embedding):
    return parse_config(
        {
            "model": {
                "d_model": 16,
                "pattern": pattern,
                "layers": {name: LAYERS[name] for name in pattern.split()},
                "embedding": embedding,
            },
            "data": {"kind": "text", "path": str(path), "seq_len": 64},
            "train": {"steps": 4, "batch_size": 2, "log_every_steps": 2},
        }
    )


PROBE = parse_config(
    {
        "model": {"d_model": 16, "pattern": "c a", "layers": LAYERS},
        "data": {
            "kind": "probe",
            "probe": "mqar",
            "preset": "ci",
            "train_params": {"n_pairs": [1, 2]},
            "test_params": {"n_pairs": [2, 4]},
            "n_test": 16,
        },
        "train": {"steps": 4, "batch_size": 4, "eval_every_steps": 2},
    }
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    corpus = root / "corpus"
    corpus.mkdir()
    for i in range(30):
        (corpus / f"{i}.txt").write_text(f"number {i} = values + letter * window\n" * (4 + i % 5))
    for name, pattern, positions in (("short", "a", {}), ("learned", "c a", {"positions": "learned"})):
        limits = positions and {**positions, "max_positions": 64}
        train(text_config(corpus, pattern, **limits), root / name, console=QUIET)
    return [root / "short", root / "learned"]


def test_a_run_on_text_gets_text_model_and_sample(runs):
    for run in runs:
        found = evaluate_run(run, **FAST, prompt="number")
        stored = read_results(run)
        assert stored["text"]["bits_per_byte"] == found["text"]["bits_per_byte"]
        assert found["text"]["n_bytes"] == found["text"]["n_tokens"] > 0
        assert set(found["text"]["baselines"]) == {"zlib -9", "lzma"}
        assert found["sample"]["prompt"] == "number"
        assert found["step"] == 4
        assert found["model"]["parameters"] == sum(r["parameters"] for r in found["model"]["layers"]) + (
            found["model"]["embedding_parameters"] + 16  # the final norm
        )
    rows = compare({run.name: read_results(run) for run in runs}, resamples=100)
    assert [row.task for row in rows] == ["held-out text"]


def test_part_of_the_text_is_the_same_part_for_all(runs):
    parts = [evaluate_run(run, **FAST, max_bytes=150)["text"] for run in runs]
    assert [d.hash for d in parts[0]["documents"]] == [d.hash for d in parts[1]["documents"]]
    assert parts[0]["n_bytes"] < evaluate_run(runs[0], **FAST)["text"]["n_bytes"]


@pytest.mark.filterwarnings("ignore")
def test_tasks_are_made_from_the_runs_text(runs):
    text = evaluate_run(runs[0], **FAST)["text"]
    evaluate_tasks(runs[0], ["hybrid_lm_text"], **CPU)
    found = evaluate_tasks(runs[0], ["hybrid_lm_names"], limit=2, **CPU)
    assert len(found["samples"]["hybrid_lm_names"]) == 2
    assert found["step"] == 4
    stored = read_results(runs[0])
    assert set(stored["harness"]["results"]) == {"hybrid_lm_text", "hybrid_lm_names"}
    bits = stored["harness"]["results"]["hybrid_lm_text"]["bits_per_byte,none"]
    # The same windows; the bound is that of test_harness, for these losses far below it.
    assert bits == pytest.approx(text["bits_per_byte"], rel=1e-5)
    assert "text" in stored
    with pytest.raises(ValueError, match=r"hybrid_lm_text: made from the run's text.*run other tasks apart"):
        evaluate_tasks(runs[0], ["hybrid_lm_text", "lambada"], **CPU)


def test_a_probe_is_trained_and_tested_once_per_seed(tmp_path):
    rows = run_probe(PROBE, tmp_path / "recall", seeds=[0, 1], console=QUIET)
    assert [(row["seed"], row["setting"]["n_pairs"]) for row in rows] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert all(row["examples_seen"] == 16 and row["cpu_s"] > 0 for row in rows)
    assert rows[0]["data_hash"] == rows[2]["data_hash"]
    assert rows[0]["loss"] != rows[2]["loss"]
    again = run_probe(PROBE, tmp_path / "recall", seeds=[1], console=QUIET)
    stored = read_rows(tmp_path / "recall" / "results.jsonl")
    assert [row["seed"] for row in stored] == [0, 0, 1, 1]
    assert again[0]["cpu_s"] is None
    assert [row["loss"] for row in again] == [row["loss"] for row in rows[2:]]
    assert read_run("x", [tmp_path / "recall"]).probe == stored
    seed = read_run("x", [tmp_path / "recall" / "seed-0"])
    assert [row["loss"] for row in seed.probe] == [row["loss"] for row in rows[:2]]
    with pytest.raises(ValueError, match="a run on a probe has no tokenizer"):
        evaluate_tasks(tmp_path / "recall" / "seed-0", ["hybrid_lm_text"], **CPU)


def test_a_probe_that_ended_at_its_accuracy_is_not_trained_on(tmp_path):
    enough = PROBE.model_copy(update={"train": PROBE.train.model_copy(update={"stop_at_accuracy": 0.0})})
    rows = run_probe(enough, tmp_path / "recall", console=QUIET)
    again = run_probe(enough, tmp_path / "recall", console=QUIET)
    assert [row["steps"] for row in (*rows, *again)] == [2] * 4
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


def test_text_and_recall_make_one_line_of_a_report(runs, tmp_path):
    run_probe(PROBE, tmp_path / "recall", seeds=[0], console=QUIET)
    evaluate_run(runs[0], **FAST)
    for folders in ([runs[0], tmp_path / "recall"], [tmp_path / "recall" / "seed-0", runs[0]]):
        run = read_run("both", folders)
        assert run.model == read_results(runs[0])["model"]
        assert len(run.probe) == 2
        assert [record["step"] for record in run.train] == [2, 4]
    assert "both" in report({"both": [runs[0], tmp_path / "recall"]}, tmp_path / "r.html").read_text()


def test_text_cannot_be_a_probe(runs, tmp_path):
    with pytest.raises(ValueError, match=r"data\.kind is text: run_probe trains probes"):
        run_probe(text_config("x", "a"), tmp_path)


def test_milestones_are_the_first_steps_there(tmp_path):
    lines = [(10, 0.2), (20, 0.6), (30, 0.4), (40, 0.95)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"kind": "eval", "step": {step}, "accuracy/n_pairs=4": {x}}}\n' for step, x in lines)
    )
    assert steps_to(tmp_path, {"n_pairs": 4}) == {"0.5": 20, "0.9": 40, "0.99": None}


def test_a_run_whose_text_is_gone_still_has_its_own(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "moved")
    found = evaluate_run(tmp_path / "moved", **FAST)
    assert found["text"]["bits_per_byte"] == evaluate_run(runs[0], **FAST)["text"]["bits_per_byte"]


def test_a_replaced_token_store_is_not_evaluated_on(runs, tmp_path):
    corpus, store = runs[0].parent / "corpus", tmp_path / "store"
    prepare(corpus, store, TokenizerConfig())
    train(text_config(store, "a"), tmp_path / "run", console=QUIET)
    assert evaluate_run(tmp_path / "run", **FAST)["text"]["bits_per_byte"] > 0
    # Another split of the same documents: some that are held out now have been trained on.
    prepare(corpus, store, TokenizerConfig(), val_fraction=0.5, overwrite=True)
    with pytest.raises(ValueError, match="is not the one that the run was trained on"):
        evaluate_run(tmp_path / "run", **FAST)
