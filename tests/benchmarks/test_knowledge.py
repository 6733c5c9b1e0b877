"""The benchmark of knowledge: the systems and their costs, what is measured, resuming, and the command."""

import json
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.knowledge import __main__ as command
from benchmarks.knowledge import training
from benchmarks.knowledge.data import NOTHING, Questions
from benchmarks.knowledge.measure import answers, known_bits, text_loss
from benchmarks.knowledge.models.decoder import Decoder, SwiGLU
from benchmarks.knowledge.models.experts import Experts
from benchmarks.knowledge.models.ngrams import NGrams
from benchmarks.knowledge.plan import SWEEPS, Runs, chosen_rates, work
from benchmarks.knowledge.report import EQUAL, comparison_tables, judge
from benchmarks.knowledge.systems import SIZES, SYSTEMS, Rates, build, costs
from benchmarks.knowledge.training import Run, train
from memcompile.config import OPTION_NAMES, VARIANTS
from tests.benchmarks.knowledge_data import corpus, plan, tiny

__all__ = ["tiny"]  # a fixture
pytestmark = pytest.mark.usefixtures("tiny")


def experts_in_full(layer, tokens):
    """All experts of all tokens, [tokens, experts, width], weighted by nothing; and the router's shares."""
    gate, up = torch.einsum("td,ehd->teh", tokens, layer.gate_up).chunk(2, dim=-1)
    return torch.einsum("teh,edh->ted", F.silu(gate) * up, layer.down), layer.router(tokens).softmax(-1)


def test_experts_choose_their_tokens_in_training():
    torch.manual_seed(0)
    layer, x = Experts(16, 4).double(), torch.randn(3, 8, 16, dtype=torch.float64, requires_grad=True)
    y, shares = experts_in_full(layer, x.flatten(0, 1))
    chosen = torch.zeros_like(shares, dtype=torch.bool)
    for expert in range(4):
        best = sorted(range(24), key=lambda token: -shares[token, expert].item())[: 24 // 4]
        chosen[best, expert] = True
    expected = ((chosen * shares)[..., None] * y).sum(1).view_as(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    ones = torch.ones_like(x)
    wanted = torch.autograd.grad(expected, [x, *layer.parameters()], ones)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x), [x, *layer.parameters()], ones), wanted, rtol=1e-10, atol=1e-12
    )


def test_the_best_expert_answers_at_inference():
    torch.manual_seed(1)
    layer, x = Experts(16, 4).double().eval(), torch.randn(3, 8, 16, dtype=torch.float64)
    y, shares = experts_in_full(layer, x.flatten(0, 1))
    best = shares.argmax(-1)
    assert len(best.unique()) > 1
    expected = torch.stack([shares[t, e] * y[t, e] for t, e in enumerate(best.tolist())]).view_as(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_experts_take_the_flops_of_one_ffn_and_the_router(training):
    x = torch.randn(4, 16, 32)

    def flops(module):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x)
        return counter.get_total_flops()

    layer = Experts(32, 4).train(training)
    assert flops(layer) == flops(SwiGLU(32)) + flops(layer.router)


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_system_reads_what_comes_later(system):
    torch.manual_seed(0)
    model = build(system, "tiny", 300).eval()
    if system == "ngram":
        torch.nn.init.normal_(model.before["1"].value.weight)
    tokens = torch.randint(300, (2, 20))
    later = tokens.clone()
    later[:, 12:] = torch.randint(300, (2, 8))
    a, b = model(tokens), model(later)
    torch.testing.assert_close(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])
    positions = torch.tensor([3, 25])
    torch.testing.assert_close(model(tokens, positions), a.flatten(0, 1)[positions])


def test_ngram_addresses_are_of_the_last_tokens():
    layer = NGrams(16, rows=1000, row_size=4)
    tokens = torch.tensor([[5, 6, 7, 8, 6, 7, 8, 9, 7, 8]])
    addresses = layer.addresses(tokens)[0]
    assert addresses.shape == (10, 4) and addresses.min() >= 0 and addresses.max() < 1000
    assert torch.equal(addresses[3], addresses[6])  # 6 7 8 both times
    assert torch.equal(addresses[9, :2], addresses[3, :2]) and not torch.equal(addresses[9, 2:], addresses[3, 2:])


def test_costs():
    vocabulary = 300
    of = {system: costs(build(system, "small", vocabulary), 64) for system in SYSTEMS}
    asked = of["memory+"].parameters
    assert all(abs(of[system].parameters / asked - 1) < EQUAL for system in ("moe", "ngram", *VARIANTS))
    assert all(of[variant].flops <= of["dense"].flops for variant in VARIANTS)
    assert 2 <= of["dense2x"].flops / of["dense"].flops < 2.6 and 4 <= of["dense4x"].flops / of["dense"].flops < 4.8
    router = of["moe"].flops - of["dense"].flops
    assert 0 < router < 0.07 * of["dense"].flops
    for cost in of.values():
        assert cost.bytes == 4 * cost.active < 4 * cost.parameters
    size = SIZES["small"]
    table = size.memory["n_keys"] ** 2 * size.width
    hits = size.memory["memory_layers"] * size.memory["heads"] * size.memory["top_k"] * size.width
    assert of["memory+"].parameters - of["memory+"].active == (vocabulary - 1) * size.width + table - hits


def test_a_dense_system_takes_no_options_of_a_memory():
    with pytest.raises(ValueError, match="moe has no memory: leave n_keys out"):
        build("moe", "tiny", 300, {"n_keys": 8})


def test_all_systems_are_tuned_by_the_same_budget():
    assert len({len(system.rates) for system in SYSTEMS.values()}) == 1
    assert all(len(set(system.rates)) == len(system.rates) for system in SYSTEMS.values())
    assert {name for sweep in SWEEPS.values() for options in sweep for name in options} <= set(OPTION_NAMES)


def test_known_bits_by_hand():
    relations = ["a", "a", "b", "b"]
    code = torch.tensor([3.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    model = torch.tensor([0.5, 4.0, 5.0, 0.0], dtype=torch.float64)
    assert known_bits(relations, code, model) == 1.5  # a saves 2.5 and loses 1; b would lose 3, and is left unused
    assert known_bits(relations, code, code) == 0
    assert known_bits(relations, code, torch.zeros(4)) == 8


def test_answers_are_those_of_greedy_decoding():
    """Half of the expected answers are what the model writes, token by token; the others differ in one token."""
    torch.manual_seed(0)
    model = Decoder(300, 16, 2)
    torch.nn.init.normal_(model.tokens.weight)
    rows, goals, expected_bits = [], [], []
    for i in range(8):
        question, answer, bits = torch.randint(300, (4 + i % 3,)).tolist(), [], 0.0
        for place in range(4):
            logits = model(torch.tensor([question + answer]))[0, -1].log_softmax(-1)
            token = int(logits.argmax()) if i % 2 or place != i // 2 else int(logits.argmin())
            answer.append(token)
            bits -= logits[token].item() / math.log(2)
        goal = [NOTHING] * (len(question) - 1) + answer + [NOTHING]
        row = question + answer
        rows.append(row + [0] * (12 - len(row)))
        goals.append(goal + [NOTHING] * (12 - len(goal)))
        expected_bits.append(bits)
    model.train()
    right, bits = answers(model, Questions(torch.tensor(rows), torch.tensor(goals), torch.arange(8)))
    assert right.tolist() == [False, True] * 4 and model.training
    torch.testing.assert_close(bits, torch.tensor(expected_bits, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_loss_of_text_in_bits_a_byte():
    data, model = corpus(), Decoder(320, 16, 1)
    torch.nn.init.zeros_(model.head.weight)  # all tokens are equally likely
    bytes_per_token = data.other_text_bytes / len(data.other_text)
    assert text_loss(model, data) == pytest.approx(math.log2(320) / bytes_per_token, rel=1e-5)


def one_run(system, **changes):
    rates = Rates(0.01, 0.01) if "memory" in system else Rates(0.01)
    return Run(
        **{"system": system, "size": "tiny", "seed": 0, "rates": rates, "steps": 9, "facts": 24, "digest": "x"}
        | changes
    )


@pytest.fixture
def digests(monkeypatch):
    """In the place of measures: the sums of all parameters, which one other bit changes."""
    monkeypatch.setattr(training, "EVALUATIONS", 3)
    monkeypatch.setattr(
        training, "measures", lambda model, _: {name: p.double().sum().item() for name, p in model.state_dict().items()}
    )


@pytest.mark.parametrize(
    ("system", "options"),
    [("dense", {}), ("moe", {}), ("ngram", {}), ("memory+", {"values_grad": "sparse"})],
)
def test_a_run_that_is_interrupted_goes_on_bit_for_bit(tmp_path, digests, system, options):
    data, run = corpus(), one_run(system, options=options)

    def ignore(steps):
        pass

    whole = train(run, data, tmp_path / "whole", ignore)
    done = 0

    def interrupt(steps):
        nonlocal done
        done += steps
        if done == 5:  # the state of step 3 is saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, data, tmp_path / "cut", interrupt)
    assert [path.suffix for path in (tmp_path / "cut").iterdir()] == [".pt"]
    heard = []
    cut = train(run, data, tmp_path / "cut", heard.append)
    assert heard == [3, 1, 1, 1, 1, 1, 1, 0]
    for result in (whole, cut):
        del result["train_seconds"], result["train_cpu_seconds"]
    assert cut == whole
    assert [path.suffix for path in (tmp_path / "cut").iterdir()] == [".json"]


def test_a_run_that_has_ended_is_not_trained_again(tmp_path, digests):
    data, run = corpus(), one_run("dense", steps=2)
    first, heard = train(run, data, tmp_path, lambda _: None), []
    assert train(run, data, tmp_path, heard.append) == json.loads(json.dumps(first)) and not heard
    other = one_run("dense", steps=3)
    assert other.key != run.key and train(other, data, tmp_path, heard.append)["steps"] == sum(heard) == 3


def test_seeds_and_rates_give_other_trainings(tmp_path, digests):
    data = corpus()
    runs = [one_run("dense", steps=2), one_run("dense", steps=2, seed=1), one_run("dense", steps=2, rates=Rates(0.02))]
    results = [train(run, data, tmp_path, lambda _: None) for run in runs]
    assert len({result["head.weight"] for result in results}) == 3


def test_a_training_that_diverges_is_told_and_has_no_measures(tmp_path):
    result = train(one_run("dense", rates=Rates(float("inf"))), corpus(), tmp_path, lambda _: None)
    assert result["diverged"] and "recall" not in result
    assert comparison_tables([result], "tiny") == [] and chosen_rates([result]) == {}


def test_a_model_that_is_trained_for_long_knows_the_facts(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "EVALUATIONS", 1)
    data = corpus(3)
    result = train(one_run("dense", steps=300), data, tmp_path, lambda _: None)
    assert result["recall"] == 1 and result["history"] == [{"step": 300, "recall": 1.0}]
    assert 0.7 * data.bits.sum() < result["known_bits"] <= data.bits.sum()


def test_tuning_chooses_the_best_rates():
    runs = Runs(plan(tuning_steps=2), "x")
    tried = runs.tuning()
    assert len(tried) == 2 * 3 and {run.seed for run in tried} == {100}
    results = [
        {"system": run.system, "size": run.size, "rates": {"lr": run.rates.lr, "values_lr": run.rates.values_lr}}
        | {"diverged": i == 5, "recall": i / 10}
        for i, run in enumerate(tried)
    ]
    chosen = chosen_rates(results)
    assert [run.rates for run in runs.comparison(chosen)] == [SYSTEMS["dense"].rates[2], SYSTEMS["memory+"].rates[1]]
    assert [run.rates for run in runs.comparison({})] == [SYSTEMS["dense"].rates[0], SYSTEMS["memory+"].rates[0]]
    assert [work(run) for run in Runs(plan(systems=("dense2x",), sizes=("small",)), "x").comparison({})] == [8]


def made_up(system, recall, held_out, flops, text):
    return {
        "system": system,
        "size": "tiny",
        "diverged": False,
        "recall": recall,
        "held_out": held_out,
        "flops": flops,
    } | {"text_bits_per_byte": text}


def test_goals():
    dense, ours = made_up("dense", 0.3, 0.2, 100, 2.0), made_up("memory+", 0.7, 0.5, 99, 2.01)
    assert [goal.met for goal in judge([dense, ours], "tiny")] == [True, True, True]
    for worse, met in (
        ({"recall": 0.59}, [False, True, True]),
        ({"held_out": 0.39}, [True, False, True]),
        ({"flops": 101}, [False, False, True]),
        ({"text_bits_per_byte": 2.03}, [True, True, False]),
    ):
        assert [goal.met for goal in judge([dense, ours | worse], "tiny")] == met
    assert judge([dense], "tiny") == []


def test_a_whole_run_and_an_interrupted_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SWEEPS, "slots", [{"n_keys": 4, "top_k": 4}, {"n_keys": 8, "top_k": 4}])
    data, asked = corpus(), plan(systems=("dense", "ngram"), sweeps=("slots",), seeds=(0, 1), tuning_steps=2)
    real, trained = command.train, []

    def interrupting(run, *arguments):
        trained.append(run)
        if len(trained) in (4, 12):
            os.kill(os.getpid(), signal.SIGINT)
        return real(run, *arguments)

    monkeypatch.setattr(command, "train", interrupting)
    for tuned, compared in ((3, 0), (6, 1), (6, 4)):
        benchmark = command.Knowledge(asked, data, tmp_path / "knowledge", False, "python -m this")
        results = benchmark.run(tmp_path)
        printed = capsys.readouterr().out
        assert (len(results.more["tuning"]), len(results.medians)) == (tuned, compared)
        assert results.complete == (compared == 4)
        assert (f"interrupted after {tuned + compared} trainings" in printed) == (not results.complete)
    assert len(trained) == 4 + 8 + 12
    content = json.loads((tmp_path / "knowledge-test.json").read_text())
    assert (
        content["complete"]
        and content["command"] == "python -m this"
        and content["versions"]["torch"] == torch.__version__
    )
    assert [(m["system"], m["seed"]) for m in content["medians"]] == [
        ("dense", 0),
        ("ngram", 0),
        ("dense", 1),
        ("ngram", 1),
    ]
    assert [s["slots"] for s in content["sweeps"]] == [16, 64] and content["goals"] == []
    for text in ("about the FLOPs a token of dense", "source code that was not trained", "n_keys 8, top_k 4", " ± "):
        assert text in printed
    for figure in ("steps", "flops", "bits", "slots"):
        assert (tmp_path / f"knowledge-test-{figure}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--systems", "dens"], "'dens' is no system: choose from 'dense'"),
        (["--sizes", "huge"], "'huge' is no size: choose from 'small'"),
        (["--sweep", "depth"], "'depth' is no sweep: choose from 'slots'"),
        (["--short", "--full"], "not allowed with argument"),
        (["--steps", "0"], "must be at least 1"),
        (["--facts", "many"], "invalid positive value"),
    ],
)
def test_wrong_options(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        command.Knowledge.parse(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_options():
    def asked_by(*arguments):
        return command.plan_of(command.Knowledge.parse(arguments))

    asked = asked_by("--systems", "moe", "dense", "--facts", "70", "--seeds", "2", "--tune", "5", "--sweep", "gate")
    assert (asked.systems, asked.data.facts, asked.seeds, asked.tuning_steps) == (("moe", "dense"), 70, (0, 1), 5)
    assert asked.sweeps == ("gate",) and asked.name == "short"
    assert asked_by().systems == ("dense", "moe", "memory+")
    full = asked_by("--full")
    assert len(full.sizes) == 2 and len(full.seeds) == 3 and full.tuning_steps and set(full.systems) == set(SYSTEMS)


def test_compiled_runs_ask_for_the_backend_of_their_system(tmp_path, digests, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, backend: asked.append(backend) or model)
    for system in ("dense", "memory+"):
        eager, compiled = one_run(system, steps=2), one_run(system, steps=2, compiled=True)
        assert eager.key != compiled.key
        train(compiled, corpus(), tmp_path, lambda _: None)
    assert asked == ["inductor", "memcompile"]
