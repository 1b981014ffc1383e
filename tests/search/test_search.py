"""The search: what it finds, ask and tell, what fails, what is refused."""

import dataclasses
import importlib.util
import math
import re
import sys

import pytest
import torch
from fake_net import SMALL, FakeNet, evaluate, everything, score_of

import glora_kernels as gk
from glora_kernels.search.space import parameters_of

QUICK = {"population": 8, "generations": 4, "parents": 3, "front_parents": 2}


def searched(net=None, evaluate=evaluate, **arguments):
    search = gk.Search(net or FakeNet(), evaluate, **QUICK | arguments)
    search.run(progress=False)
    return search


def trace(search):
    return [(done.generation, done.child, tuple(done.candidate.values()), done.score) for done in search.finished]


@pytest.mark.parametrize("minimize", [False, True])
@pytest.mark.parametrize("limit", [None, 20, 45, 90])
def test_a_small_space_is_searched_to_its_optimum(limit, minimize):
    net = FakeNet(3)
    sign = -1 if minimize else 1
    every = [c for c in everything(net) if limit is None or parameters_of(c, net.shapes) <= limit]
    assert len(everything(net)) == 6**3
    best = max(sign * score_of(candidate) for candidate in every)
    search = searched(net, max_parameters=limit, minimize=minimize, population=20, generations=12)
    assert sign * score_of(search.best) == best
    assert limit is None or all(done.parameters <= limit for done in search.finished)
    assert all(done.parameters == parameters_of(done.candidate, net.shapes) for done in search.finished)
    if limit is None:
        assert len(search.finished) < len(every), "it looked everywhere"


def test_it_ends_where_the_whole_space_is_evaluated():
    net = FakeNet(1)
    search = searched(net)
    assert sorted(map(score_of, everything(net))) == sorted(done.score for done in search.finished)
    assert len(net.used) == 6
    assert search.done
    assert search.ask(5) == []


def test_no_candidate_is_evaluated_twice_and_all_are_in_the_space():
    net = FakeNet(6, gk.SearchSpace())
    search = searched(net, max_parameters=300)
    keys = [tuple(candidate.values()) for candidate in net.used]
    assert len(keys) == len(set(keys)) == len(search.finished)
    assert len(keys) <= 8 * 5
    for path, space in net.spaces.items():
        assert {candidate[path] for candidate in net.used} <= set(space.configs(net.shapes[path]))


def test_equal_searches_are_equal_and_the_seed_decides():
    one = trace(searched(FakeNet(6)))
    torch.manual_seed(1)
    assert trace(searched(FakeNet(6))) == one
    assert trace(searched(FakeNet(6), seed=1)) != one


def test_the_paper_makes_1050_evaluations_at_most_and_none_above_the_limit():
    net = FakeNet(12, gk.SearchSpace.paper())
    search = gk.Search(net, evaluate, max_parameters=400, preset="paper")
    search.run(progress=False)
    assert 1000 < len(search.finished) <= 1050
    assert max(done.parameters for done in search.finished) <= 400
    first = [done.score for done in search.finished if done.generation == 0]
    assert score_of(search.best) > max(first)
    assert search.pareto()[-1].candidate == search.best


def test_the_last_generation_is_ranked():
    search = searched(FakeNet(8), generations=0)
    assert score_of(search.best) == max(done.score for done in search.finished)
    found = [searched(FakeNet(8), generations=g) for g in (1, 2, 3)]
    assert any(max(s.finished, key=lambda done: done.score).generation == g for g, s in enumerate(found, 1))
    assert all(score_of(s.best) == max(done.score for done in s.finished) for s in found)


def test_pareto_is_what_nothing_dominates():
    search = searched(FakeNet(6), minimize=True)
    every = search.finished
    points = [(done.score, done.parameters) for done in every]
    beaten = [any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points) for p in points]
    front = search.pareto()
    assert {id(done) for done in front} == {id(a) for a, lost in zip(every, beaten, strict=True) if not lost}
    assert [done.parameters for done in front] == sorted(done.parameters for done in front)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_ask_and_tell_equal_run(size):
    search = gk.Search(FakeNet(6), **QUICK)
    while not search.done:
        candidates = search.ask(size)
        assert len(candidates) <= size
        search.tell(candidates[::-1], [torch.tensor(score_of(c), dtype=torch.float64) for c in candidates[::-1]])
    assert sorted(trace(search), key=lambda t: t[:2]) == trace(searched(FakeNet(6)))


def test_evaluate_many_equals_evaluate():
    batches = []

    def many(candidates):
        batches.append(len(candidates))
        return [score_of(candidate) for candidate in candidates]

    assert trace(searched(FakeNet(6), None, evaluate_many=many)) == trace(searched(FakeNet(6)))
    assert len(batches) == 5


def test_asked_candidates_wait_until_told():
    search = gk.Search(FakeNet(6), evaluate, **QUICK)
    asked = search.ask(8)
    assert search.waiting == asked
    assert search.ask(3) == []
    assert not search.done
    search.tell(asked[2:3], [0.5])
    assert search.waiting == asked[:2] + asked[3:]
    search.run(progress=False)
    assert search.done
    assert search.waiting == []


def test_bad_tells_record_nothing():
    search = gk.Search(FakeNet(), **QUICK)
    first, second = search.ask(2)
    never = next(c for c in everything(search._net) if c not in (first, second))
    search.tell([first], [1.0])
    for candidates, scores, kind, words in [
        ([second, never], [1.0, 2.0], ValueError, "never asked for"),
        ([second, dict(list(second.items())[1:])], [1.0, 2.0], ValueError, "never asked for"),
        ([second, first], [1.0, 2.0], ValueError, "told before"),
        ([second, second], [1.0, 2.0], ValueError, "twice"),
        ([second], [1.0, 2.0], ValueError, "1 candidates, 2 scores"),
        ([second], [None], TypeError, "a score must be a number, got None"),
        ([second], ["1.0"], TypeError, "a score must be a number, got '1.0'"),
        ([second], [torch.ones(2)], TypeError, "a score must be a number"),
        ([3], [1.0], TypeError, "mappings, got int"),
    ]:
        with pytest.raises(kind, match=words):
            search.tell(candidates, scores)
        assert len(search.finished) == 1
        assert search.waiting == [second]
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        search.ask(0)
    with pytest.raises(ValueError, match="run needs evaluate"):
        search.run()


def test_a_start_is_the_first_of_generation_0():
    net = FakeNet()
    lora = gk.GLoRAConfig.lora(rank=2)
    picked = {
        "lora": lora,
        "one layer": {"blocks.1.*": None, "blocks.0.proj": gk.GLoRAConfig("vector", "lora", rank=1)},
    }
    search = searched(net, start=picked)
    first, second = search.finished[:2]
    assert (first.name, second.name, search.finished[2].name) == ("lora", "one layer", None)
    shapes = net.shapes.values()
    assert first.parameters == sum(2 * (k + n) for k, n, _ in shapes)
    assert set(first.candidate.values()) == {gk.GLoRAConfig("none", "lora", rank=2, alpha=2.0)}
    assert [config.is_empty for config in second.candidate.values()] == [False, True, True, True]
    assert trace(searched(net, start=[second.candidate]))[0][2] == tuple(second.candidate.values())
    names = [done.name for done in searched(net, start=[lora]).finished]
    assert names[0] == "start[0]"
    for done in (first, second):
        front = search.pareto()
        assert any(f.score >= done.score and f.parameters <= done.parameters for f in front)


def no_supports(**others):
    return gk.GLoRAConfig(**dict.fromkeys("ABCDE", "none") | others)


FOUR = [no_supports(A=a, B=b, rank=1) for a in ("none", "vector") for b in ("none", "lora")]


@pytest.mark.parametrize(
    ("start", "kind", "words"),
    [
        ([gk.GLoRAConfig("constant")], ValueError, r"start: 'start\[0\]', layer 'blocks.0.proj': A must be one of"),
        ({"mine": {"*.fc": gk.GLoRAConfig(rank=4)}}, ValueError, "'mine', layer 'blocks.0.fc': rank must be one"),
        ([gk.GLoRAConfig(rank=2)], ValueError, r"'start\[0\]' has \d+ parameters; max_parameters=60 are accepted"),
        ([no_supports(), {"*": None}], ValueError, r"'start\[0\]' and 'start\[1\]' are the same"),
        ([{"nowhere": None}], ValueError, "the pattern 'nowhere' matches no searched layer"),
        ([{"*": 3}], TypeError, "layer 'blocks.0.proj': a configuration must be a GLoRAConfig, got int"),
        ([3], TypeError, r"'start\[0\]' must be a GLoRAConfig or a candidate, got int"),
        (gk.GLoRAConfig(), TypeError, "start takes a list"),
        ({"blocks.0.proj": gk.GLoRAConfig()}, TypeError, "start takes a list"),
        (FOUR, ValueError, "start has 4 candidates, more than population=3"),
    ],
)  # fmt: skip
def test_a_bad_start_is_refused(start, kind, words):
    few = start is FOUR
    with pytest.raises(kind, match=words):
        gk.Search(FakeNet(), start=start, max_parameters=None if few else 60, population=3 if few else 8)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"seed": 1.0}, ValueError, "seed must be an integer, got 1.0"),
        ({"max_parameters": 1e5}, ValueError, "max_parameters must be an integer >= 0"),
        ({"max_failures": 0}, ValueError, "max_failures must be an integer >= 1"),
        ({"minimize": 1}, TypeError, "minimize must be True or False"),
        ({"preset": "original"}, ValueError, "preset must be one of None, 'paper'; got 'original'"),
        ({"evaluate_many": list}, ValueError, "give one of them"),
    ],
)
def test_bad_arguments_are_refused(arguments, kind, words):
    with pytest.raises(kind, match=words):
        gk.Search(FakeNet(), evaluate, **arguments)


def test_an_impossible_limit_is_refused_before_anything_runs(tmp_path):
    space = dataclasses.replace(SMALL, A=("vector",))
    net = FakeNet(4, space)
    least = sum(shape.out_features for shape in net.shapes.values())
    with pytest.raises(ValueError, match=f"={least - 1} is impossible: the smallest candidate has {least} parameters"):
        gk.Search(net, evaluate, max_parameters=least - 1, path=tmp_path / "ledger")
    assert not net.used
    assert not list(tmp_path.iterdir())
    search = searched(net, max_parameters=least)
    assert [done.parameters for done in search.finished] == [least]
    with pytest.raises(ValueError, match="no layer to search"):
        gk.Search(FakeNet(0), evaluate)


def failing(every):
    """Fails for some candidates, by what they are."""

    def act(model):
        if sum(map(ord, repr(model.candidate))) % every == 0:
            raise RuntimeError("out of memory\nat 0x7f3a")
        return score_of(model.candidate)

    return act


def test_a_candidate_that_fails_is_recorded_and_the_search_goes_on():
    search = gk.Search(FakeNet(6), failing(3), **QUICK)
    with pytest.warns(UserWarning, match="failed, 0 NaN; best .* RuntimeError: out of memory"):
        search.run(progress=False)
    failed = [done for done in search.finished if done.score is None]
    assert 0 < len(failed) < len(search.finished)
    assert {done.failure for done in failed} == {"RuntimeError: out of memory"}
    assert not {id(done) for done in failed} & {id(done) for done in search.pareto()}
    assert f"{len(failed)} failed" in repr(search)


def test_a_score_that_is_no_number_is_a_failure():
    search = gk.Search(FakeNet(), lambda model: None, max_failures=3, **QUICK)
    with pytest.raises(RuntimeError, match=r"the last 3 .* TypeError: a score must be a number, got None"):
        search.run(progress=False)


def test_failures_in_a_row_stop_the_search_which_can_go_on():
    broken = True

    def flaky(model):
        if broken:
            raise OSError("disk at 0xab12 is gone")
        return score_of(model.candidate)

    search = gk.Search(FakeNet(6), flaky, max_failures=3, **QUICK)
    with pytest.raises(RuntimeError, match=r"max_failures=3.*OSError: disk at 0x... is gone") as caught:
        search.run(progress=False)
    assert isinstance(caught.value.__cause__, OSError)
    assert len(search.finished) == 3
    with pytest.raises(ValueError, match="no candidate has a score yet"):
        _ = search.best
    with pytest.raises(RuntimeError, match="the last 4 candidates failed"):
        search.run(progress=False)
    broken = False
    with pytest.warns(UserWarning, match="4 failed"):
        search.run(progress=False)
    assert search.done
    assert sum(done.score is None for done in search.finished) == 4


@pytest.mark.parametrize("minimize", [False, True])
def test_nan_ranks_last_and_is_counted(minimize):
    def sometimes(model):
        score = score_of(model.candidate)
        return math.nan if int(score * 1e4) % 4 == 0 else score

    search = gk.Search(FakeNet(6), sometimes, minimize=minimize, **QUICK)
    with pytest.warns(UserWarning, match=r"0 failed, [1-9]\d* NaN"):
        search.run(progress=False)
    scores = [done.score for done in search.finished if not math.isnan(done.score)]
    assert len(scores) < len(search.finished)
    assert score_of(search.best) == (min if minimize else max)(scores)
    assert all(done.score in scores for done in search.pareto())


def test_nan_alone_is_no_best():
    search = gk.Search(FakeNet(), lambda model: math.nan, **QUICK)
    with pytest.warns(UserWarning, match="NaN"):
        search.run(progress=False)
    with pytest.raises(ValueError, match="no candidate has a score yet"):
        _ = search.best
    assert search.pareto() == []


def test_evaluate_many_that_raises_or_miscounts_keeps_nothing():
    def raising(candidates):
        raise ConnectionError("lost")

    search = gk.Search(FakeNet(), evaluate_many=raising, **QUICK)
    with pytest.raises(ConnectionError, match="lost"):
        search.run(progress=False)
    assert search.finished == []
    search = gk.Search(FakeNet(), evaluate_many=lambda candidates: [1.0], **QUICK)
    with pytest.raises(ValueError, match="gave 1 scores for"):
        search.run(progress=False)
    assert search.finished == []


def test_evaluate_many_and_tell_take_failures():
    search = gk.Search(FakeNet(), evaluate_many=lambda cs: [*map(score_of, cs[1:]), KeyError("x")], **QUICK)
    with pytest.warns(UserWarning, match="KeyError: 'x'"):
        search.run(progress=False)
    told = gk.Search(FakeNet(), **QUICK)
    told.tell(told.ask(2), [1.0, ValueError()])
    assert [done.failure for done in told.finished] == [None, "ValueError"]


def test_ctrl_c_keeps_what_is_scored():
    count = 0

    def interrupted(model):
        nonlocal count
        count += 1
        if count == 12:
            raise KeyboardInterrupt
        return score_of(model.candidate)

    search = gk.Search(FakeNet(6), interrupted, **QUICK)
    with pytest.raises(KeyboardInterrupt):
        search.run(progress=False)
    assert len(search.finished) == 11
    search.run(progress=False)
    assert trace(search) == trace(searched(FakeNet(6)))


def test_table_and_repr_show_the_front_and_the_hand_picked():
    search = gk.Search(FakeNet(), evaluate, start={"all LoRA": gk.GLoRAConfig.lora(2)}, **QUICK)
    assert "0 evaluated" in repr(search)
    search.run(progress=False)
    lines = search.table().splitlines()
    front = search.pareto()
    assert sum(line.split()[-1] != "name" and " yes" in line for line in lines) == len(front)
    assert sum("all LoRA" in line for line in lines) == 1
    assert f"{front[-1].score:.6g}" in repr(search)


def test_progress_is_shown_on_stderr(capsys):
    search = gk.Search(FakeNet(), evaluate, **QUICK)
    search.run()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(r"generation 4 of 4: \d+ evaluated, 0 failed, 0 NaN; best ", shown.err)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_plot_writes_a_picture(tmp_path):
    start = {"all LoRA": gk.GLoRAConfig.lora(2)}
    search = gk.Search(FakeNet(), evaluate, max_parameters=500, start=start, **QUICK)
    with pytest.raises(ValueError, match="nothing to draw"):
        search.plot(tmp_path / "front.png")
    search.run(progress=False)
    search.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_extras_are_named_where_they_are_missing(monkeypatch, tmp_path):
    search = searched()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"plot needs matplotlib: pip install 'glora_kernels\[search\]'"):
        search.plot(tmp_path / "front.png")
    with pytest.raises(ImportError, match=r"to_optuna needs optuna: pip install 'glora_kernels\[search\]'"):
        search.to_optuna("sqlite://")


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs optuna")
@pytest.mark.parametrize("minimize", [False, True])
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_to_optuna_copies_the_trials(tmp_path, kind, minimize):
    import optuna

    net = FakeNet(6)
    search = gk.Search(net, failing(3), start=[gk.GLoRAConfig.lora(2)], minimize=minimize, **QUICK)
    with pytest.warns(UserWarning, match="failed"):
        search.run(progress=False)
    storage = optuna.storages.InMemoryStorage() if kind == "memory" else f"sqlite:///{tmp_path}/study.db"
    study = search.to_optuna(storage, name="mine")
    trials = optuna.load_study(study_name="mine", storage=storage).trials
    assert len(trials) == len(search.finished)
    for trial, done in zip(trials, search.finished, strict=True):
        assert trial.state.name == ("FAIL" if done.score is None else "COMPLETE")
        assert trial.values == (None if done.score is None else [done.score, done.parameters])
        assert trial.params["blocks.0.fc.B"] == done.candidate["blocks.0.fc"].B
        assert len(trial.params) == 6 * 6
    assert trials[0].user_attrs["name"] == "start[0]"
    assert {tuple(t.values) for t in study.best_trials} == {(d.score, d.parameters) for d in search.pareto()}
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        search.to_optuna(storage, name="mine")
