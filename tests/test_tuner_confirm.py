"""A second GPU of the model times what the first has found: made-up workers in place of two cards."""
import pytest

from sparsetile.autotune import batch, cli, isolate, retime, store, tasks, tune
from sparsetile.ops import dispatch
from sparsetile.profiles import lookup, schema

GPU = {"name": "Some GPU", "arch": "sm_90a"}
W = tasks.find("gpu/merge-1024")
PROBLEM = tasks.Task(W, None, hollow=True).problem


class Card:
    """The bench worker of a GPU: how long a config takes there."""

    def __init__(self, unit, us, broken=False):
        self.unit, self.us, self.broken, self.timed = unit, us, broken, 0

    def open(self, workload, seed):
        assert workload == W

    def __call__(self, order, *args, seconds=None):
        if order == "machine":
            return GPU
        if order == "facts":
            if self.unit is None:
                raise isolate.Failed("OutOfMemoryError: no room for the inputs")
            return {"problem": PROBLEM, "unit": self.unit}
        if order == "finals":
            self.timed += 1
            if self.broken:
                raise isolate.Lost("crash: SIGSEGV")
            return [[self.us(config)] * 9 for _, config in args[0]], {}
        return args[0][0]


@pytest.fixture
def found(tmp_path, monkeypatch):
    module = dispatch.kernel("cupy", "topk")  # knobs stand in for merge's, which on CuPy has none

    class Kernel:
        TUNABLES = module.TUNABLES
        default_config = staticmethod(lambda problem: {"threads": 256})
    monkeypatch.setattr(dispatch, "kernel", lambda backend, name: Kernel)
    key = lookup.key_of(PROBLEM)
    entry = {"key": key, "backend": "cupy", "config": {"threads": 512}, "time_us": 10.0, "default_us": 12.0, "status": "tuned", "workload": W.name, "unit": "aaaa0000"}
    path = store.add(tmp_path, "merge_attention", GPU, entry, {}, {})

    def on(card):
        monkeypatch.setattr(tune, "_bench", lambda role, device, isolated: card)
        bad = retime.confirm(tmp_path, 1)
        return bad, schema.load(path)["entries"][0]
    return on


def test_a_winner_is_confirmed_by_another_card_and_only_once(found):
    card = Card("bbbb1111", lambda config: 10.2 if config["threads"] == 512 else 12.3)
    bad, entry = found(card)
    assert bad == 0 and entry["confirmed"] == {"unit": "bbbb1111", "time_us": 10.2, "default_us": 12.3} and entry["config"] == {"threads": 512} and entry["time_us"] == 10.0
    assert found(Card("cccc2222", card.us)) == (0, entry)


def test_the_card_that_made_it_confirms_nothing(found):
    card = Card("aaaa0000", lambda config: 10.0)
    bad, entry = found(card)
    assert bad == 0 and "confirmed" not in entry and card.timed == 0


def test_a_winner_that_is_slower_than_the_default_elsewhere_gives_way(found):
    bad, entry = found(Card("bbbb1111", lambda config: 14.0 if config["threads"] == 512 else 12.3))
    assert bad == 1 and entry["config"] == {"threads": 256} and entry["time_us"] == entry["default_us"] == 12.0 and "512" in entry["confirmed"]["instead_of"]


def test_a_winner_that_breaks_the_other_card_is_said(found):
    bad, entry = found(Card("bbbb1111", lambda config: 1.0, broken=True))
    assert bad == 1 and entry["confirmed"]["failed"].startswith("crash") and entry["config"] == {"threads": 512}


def test_a_workload_that_the_other_card_has_no_room_for_is_said(found, capsys):
    bad, entry = found(Card(None, lambda config: 1.0))
    assert bad == 1 and "confirmed" not in entry and f"NOT       {W.name} merge_attention cupy: OutOfMemoryError" in capsys.readouterr().out


def test_every_gpu_of_a_host_tunes_and_then_each_confirms_the_others(monkeypatch):
    rounds = []
    monkeypatch.setattr(batch, "_side_by_side", lambda commands, count: rounds.append(commands) or len(rounds) - 1)
    assert batch.every_gpu(2, ["--effort", "quick"], ["a", "b", "c"], None, "p") == 1  # the worst
    assert rounds == [[["tune", "a", "c", "--device", "0", "--effort", "quick"], ["tune", "b", "--device", "1", "--effort", "quick"]],
                      [["verify", "p", "--device", "0", "--write"], ["verify", "p", "--device", "1", "--write"]]]
    rounds.clear()
    batch.every_gpu(1, [], ["a"], "journal")
    assert rounds == [[["tune", "a", "--device", "0"]], []]


def test_a_process_that_a_signal_ended_is_a_failure(monkeypatch):
    kill_itself = ["-c", "import os; os.kill(os.getpid(), 9)"]
    plain = batch.subprocess.Popen
    monkeypatch.setattr(batch.subprocess, "Popen", lambda command, env: plain([command[0], *(kill_itself if command[3] == "dies" else ["-c", ""])]))
    assert batch._side_by_side([["lives"], ["dies"], ["lives"]], 3) == 9 and batch._side_by_side([["lives"]], 1) == 0


def test_a_cpu_has_no_second_one(capsys):
    assert cli.main(["verify", "--write"]) == 1 and "--write: expected one directory and the index of a GPU" in capsys.readouterr().err
