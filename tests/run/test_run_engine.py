"""The engine of `vitask run` on small commands: what runs again and why, kills, interrupts, the lock, the script."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from whole_runs import draw_folder

from vitask_plugin.errors import VITaskError
from vitask_plugin.run.engine import Engine, script_of
from vitask_plugin.run.plan import make_plan
from vitask_plugin.run.recipe_file import parsed
from vitask_plugin.run.stage import Command, Plan, Stage
from vitask_plugin.run.versions import versions

COPY = "import sys, pathlib as p; o = p.Path(sys.argv[1]); o.mkdir(exist_ok=True); (o / 'x').write_text({!r} + {})"


def stage(out: Path, name: str, text: str, *reads: str, files: tuple[Path, ...] = (), **more: object) -> Stage:
    """A stage that writes `text` and what its inputs hold."""
    inputs = [*(out / read / "x" for read in reads), *files]
    held = " + ".join([f"p.Path({str(path)!r}).read_text()" for path in inputs] or ["''"])
    words = (sys.executable, "-c", COPY.format(text, held), str(out / name), "--text", text)
    return Stage(name, name.title(), (Command(words),), (out / name,), reads, files, **more)


@pytest.fixture
def chain(tmp_path):
    """data -> tsm -> vlm, with vanilla beside: each reads what is before it; `data` reads a file from outside."""
    source, out = tmp_path / "source.txt", tmp_path / "out"
    source.write_text("pixels")

    def plan(**texts: str) -> Plan:
        own = {"data": "d", "tsm": "t", "vanilla": "v", "vlm": "w", **texts}
        stages = (
            stage(out, "data", own["data"], files=(source,)),
            stage(out, "tsm", own["tsm"], "data"),
            stage(out, "vanilla", own["vanilla"], "data"),
            stage(out, "vlm", own["vlm"], "data", "tsm"),
        )
        return Plan(out, stages, {"PATH": os.environ["PATH"]})

    return source, plan


def run(plan: Plan) -> tuple[dict[str, str], str]:
    """What ran and why, and what was printed."""
    console = Console(file=io.StringIO(), width=400)
    engine = Engine(plan, console)
    engine.run()
    return engine.ran, console.file.getvalue()


def test_a_second_run_does_nothing_and_commands_are_printed_before(chain) -> None:
    _, plan = chain
    ran, printed = run(plan())
    assert ran == dict.fromkeys(("data", "tsm", "vanilla", "vlm"), "not done yet")
    assert printed.index("$ ") < printed.index("✓ Data") < printed.index("✓ Tsm")
    ran, printed = run(plan())
    assert ran == {} and printed.count("as it is") == 4 and "$ " not in printed


def test_a_changed_setting_reruns_its_stage_and_what_reads_it(chain) -> None:
    _, plan = chain
    run(plan())
    ran, printed = run(plan(tsm="u"))
    assert list(ran) == ["tsm", "vlm"]
    assert "text t -> u" in ran["tsm"] and ran["vlm"] == "the output of tsm changed"
    assert "tsm: " in printed and "text t -> u" in printed
    assert (plan().out / "vlm/x").read_text() == "wdpixelsudpixels"


def test_an_equal_output_ends_the_chain(chain) -> None:
    """Another command with the same result changes nothing for what reads it."""
    _, plan = chain
    run(plan())
    base = plan()
    words = (*base.stages[1].commands[0].words, "--more", "1")
    changed = replace(base.stages[1], commands=(Command(words),))
    ran, _ = run(replace(base, stages=(base.stages[0], changed, *base.stages[2:])))
    assert ran == {"tsm": "more not given -> 1"}


def test_a_changed_file_reruns_what_reads_it(chain) -> None:
    source, plan = chain
    run(plan())
    before = source.stat()
    source.write_text("PIXELS")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time: small files are read
    ran, _ = run(plan())
    assert list(ran) == ["data", "tsm", "vanilla", "vlm"] and ran["data"] == f"{str(source)!r} changed"


def test_another_version_of_a_package_reruns_all(chain, monkeypatch) -> None:
    from vitask_plugin.run import fingerprint

    _, plan = chain
    run(plan())
    found = {**fingerprint.versions(), "torch": "0.1"}
    monkeypatch.setattr(fingerprint, "versions", lambda: found)
    ran, printed = run(plan())
    assert set(ran) == {"data", "tsm", "vanilla", "vlm"} and "-> 0.1" in printed


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_of_a_table_the_images_that_it_names_count_and_no_others(separator, tmp_path) -> None:
    """A CSV may lie in a folder with anything beside it."""
    rows = [("image", "label"), ("a b.png", "x"), ("sub/c", "y"), ("n" * 300, "z")]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(separator.join(row) for row in rows))
    (tmp_path / "sub").mkdir()
    for name in ("a b.png", "sub/c.png", "other.bin"):
        (tmp_path / name).write_text("1")
    out = tmp_path / "out"
    one = stage(out, "data", "d", files=(table, tmp_path), table=table, suffix=".png")
    one = replace(one, commands=(Command((sys.executable, "-c", f"import os; os.makedirs({str(out / 'data')!r})")),))
    plan = Plan(out, (one,), {"PATH": os.environ["PATH"]})
    run(plan)
    (tmp_path / "other.bin").write_text("2")
    assert run(plan)[0] == {}
    for name in ("a b.png", "sub/c.png"):
        (tmp_path / name).write_text("2")
        assert run(plan)[0] == {"data": f"{str(tmp_path)!r} changed"}, name


def test_a_lost_or_changed_output_is_made_again(chain) -> None:
    _, plan = chain
    run(plan())
    (plan().out / "vanilla/x").write_text("edited")
    (plan().out / "tsm/x").unlink()
    (plan().out / "tsm").rmdir()
    ran, _ = run(plan())
    assert ran == {"tsm": "its output is gone", "vanilla": "its output was changed"}


def test_only_the_environment_of_the_commands_counts(chain) -> None:
    _, plan = chain
    run(plan())
    ran, _ = run(replace(plan(), environment={"PATH": f"{os.environ['PATH']}:/nowhere"}))
    assert ran == {}
    ran, _ = run(replace(plan(), environment={**plan().environment, "SIZE": "28"}))
    assert len(ran) == 4 and ran["data"] == "SIZE not given -> 28"


def test_the_precision_that_accelerate_takes_from_the_shell_counts(chain, monkeypatch) -> None:
    _, plan = chain
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    run(plan())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "ACCELERATE_MIXED_PRECISION not given -> bf16" in run(plan())[0]["tsm"]
    assert run(plan())[0] == {}


def test_versions_of_what_reads_images_and_words_count() -> None:
    assert {"accelerate", "tokenizers", "numpy", "pillow"} <= set(versions())


def test_a_moved_folder_is_the_same_run(chain, tmp_path) -> None:
    _, plan = chain
    run(plan())
    text = (plan().out / "stages.json").read_text()
    assert "OUT/tsm" in text and str(plan().out) not in text.replace("-c", "").split('"command"')[0]


def test_a_failed_command_is_run_again_with_its_output_removed(tmp_path) -> None:
    out = tmp_path / "out"
    code = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'half').touch(); sys.exit(3)"
    failing = Stage("one", "One", (Command((sys.executable, "-c", code, str(out / "one"))),), (out / "one",))
    for _ in range(2):  # a folder that is left would fail mkdir: another status
        with pytest.raises(VITaskError, match="One: failed with status 3"):
            run(Plan(out, (failing,), dict(os.environ)))


def test_a_command_that_leaves_nothing_is_no_success(tmp_path) -> None:
    nothing = Stage("one", "One", (Command((sys.executable, "-c", "")),), (tmp_path / "out/one",))
    with pytest.raises(VITaskError, match=r"ended well, and '.*one' is not there"):
        run(Plan(tmp_path / "out", (nothing,), dict(os.environ)))


def test_a_split_that_the_images_lack_ends_the_first_stage(tmp_path) -> None:
    """And not the judging, after hours of training."""
    draw_folder(tmp_path / "scans/train", 4)
    draw_folder(tmp_path / "scans/val", 2, seed=1)
    given = {"images": str(tmp_path / "scans"), "modality": "MRI"}
    plan = make_plan(parsed({"model": "tiny", "data": [given]}), tmp_path / "out", "cpu")
    plan = replace(plan, stages=plan.stages[:1])
    for _ in range(2):  # nor is it taken for done
        with pytest.raises(VITaskError, match=r"scans written: .*test.json' is not there; .* out of evaluate.splits"):
            run(plan)


# Kills -----------------------------------------------------------------------------------------------------------

# Counts to 5 in a file, 0.3 s each, going on from what is there; Ctrl-C makes it give up, as a TSM's training does.
COUNT = """
import signal, sys, time, pathlib
path = pathlib.Path(sys.argv[1]); path.mkdir(exist_ok=True); count = path / 'count'
done = int(count.read_text()) if count.exists() else 0
def give_up(*_):
    count.write_text('0'); sys.exit()
signal.signal(signal.SIGINT, give_up)
print('from', done, flush=True)
for number in range(done, 5):
    time.sleep(0.3)
    (path / 'temporary').write_text(str(number + 1))
    (path / 'temporary').rename(count)
"""
SCRIPT = """
import io, os, sys, pathlib
from rich.console import Console
from vitask_plugin.run.engine import Engine
from vitask_plugin.run.stage import Command, Plan, Stage
from vitask_plugin.run.versions import versions
out = pathlib.Path(sys.argv[1])
count = Command((sys.executable, '-c', open(sys.argv[2]).read(), str(out / 'one')))
stage = Stage('one', 'One', (count,), (out / 'one',), resumes=sys.argv[3] == 'resumes')
try:
    Engine(Plan(out, (stage,), dict(os.environ)), Console(file=io.StringIO())).run()
except KeyboardInterrupt:
    sys.exit(130)
"""


def started(tmp_path: Path, how: str) -> subprocess.Popen:
    (tmp_path / "count.py").write_text(COUNT)
    words = [sys.executable, "-c", SCRIPT, str(tmp_path / "out"), str(tmp_path / "count.py"), how]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def stopped_in_the_middle(tmp_path: Path, how: str, number: signal.Signals) -> int:
    """The status of a run that got a signal when its command had counted to 2."""
    process, count = started(tmp_path, how), tmp_path / "out/one/count"
    deadline = time.monotonic() + 60
    while not (count.exists() and count.read_text() >= "2") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    return process.wait(30)


@pytest.mark.parametrize(("how", "begins"), [("resumes", range(2, 5)), ("anew", range(1))])
def test_the_same_run_goes_on_after_sigkill(how, begins, tmp_path) -> None:
    assert stopped_in_the_middle(tmp_path, how, signal.SIGKILL) == -signal.SIGKILL
    again = started(tmp_path, how)
    assert again.wait(60) == 0, again.stderr.read()
    log = (tmp_path / "out/logs/one.log").read_text()
    assert int(log.rpartition("from ")[2]) in begins
    assert (tmp_path / "out/one/count").read_text() == "5"


def test_a_killed_run_takes_its_command_with_it(tmp_path) -> None:
    stopped_in_the_middle(tmp_path, "anew", signal.SIGKILL)
    time.sleep(1)
    left = (tmp_path / "out/one/count").read_text()
    time.sleep(1)
    assert (tmp_path / "out/one/count").read_text() == left != "5"


def test_sigterm_ends_the_run_and_what_it_started(tmp_path) -> None:
    assert stopped_in_the_middle(tmp_path, "anew", signal.SIGTERM) == 130
    assert (tmp_path / "out/one/count").read_text() != "5"
    assert '"state": "running"' in (tmp_path / "out/stages.json").read_text()


def test_what_was_stopped_goes_on_where_it_was(tmp_path) -> None:
    assert stopped_in_the_middle(tmp_path, "resumes", signal.SIGINT) == 130
    assert started(tmp_path, "resumes").wait(60) == 0
    assert int((tmp_path / "out/logs/one.log").read_text().rpartition("from ")[2]) >= 2


def test_two_runs_in_one_folder_are_refused(tmp_path) -> None:
    first, count = started(tmp_path, "anew"), tmp_path / "out/one/count"
    while not count.exists() and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)  # it is there however slowly the second starts
    second = started(tmp_path, "anew")
    assert second.wait(60) == 1 and f"another `vitask run` (process {first.pid})" in second.stderr.read()
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0


def test_commands_of_a_stage_that_had_ended_are_not_run_again(tmp_path) -> None:
    """Judged on val, killed on test: the same run judges test alone."""
    out, flag = tmp_path / "out", tmp_path / "flag"
    append = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.mkdir(exist_ok=True); (p / sys.argv[2]).touch()"
    fail = f"import pathlib, sys; sys.exit(not pathlib.Path({str(flag)!r}).exists())"
    val = Command((sys.executable, "-c", append, str(out / "one"), "val"))
    test = Command((sys.executable, "-c", f"{fail[:-1]} or exec({append!r}))", str(out / "one"), "test"))
    plan = Plan(out, (Stage("one", "One", (val, test), (out / "one",)),), dict(os.environ))
    with pytest.raises(VITaskError, match=r"One \(2 of 2\): failed"):
        run(plan)
    val_time = (out / "one/val").stat().st_mtime_ns
    flag.touch()
    ran, printed = run(plan)
    assert ran == {"one": "was not finished"} and printed.count("$ ") == 1
    assert (out / "one/test").exists() and (out / "one/val").stat().st_mtime_ns == val_time


def test_a_command_that_fails_with_status_0_is_found_by_what_it_did_not_write(tmp_path) -> None:
    """As lmms-eval does: the files of the split before are there, and none of this one."""
    out, flag = tmp_path / "out", tmp_path / "flag"
    write = f"mkdir -p {out}/one && touch {out}/one/"
    ends = ("_results.json", "_samples_x.jsonl")
    val = Command(("sh", "-c", f"{write}1_results.json {out}/one/1_samples_x.jsonl"), leaves=ends)
    code = f"{write}2_results.json; if [ -f {flag} ]; then {write}2_samples_x.jsonl; fi; echo CUDA error"
    plan = Plan(
        out, (Stage("one", "One", (val, Command(("sh", "-c", code), leaves=ends)), (out / "one",)),), {**os.environ}
    )
    with pytest.raises(VITaskError, match=r"One \(2 of 2\): .* no new file \*_samples_x.jsonl; .*logs/one-2.log"):
        run(plan)
    assert json.loads((out / "stages.json").read_text())["one"]["state"] != "done"
    flag.touch()
    ran, printed = run(plan)
    assert ran == {"one": "was not finished"} and printed.count("$ ") == 1
    assert run(plan)[0] == {}


def test_what_a_later_command_left_half_is_removed_before_it_runs_again(tmp_path) -> None:
    """lmms-eval writes a file of results under the time's name, and the samples after it."""
    out, flag = tmp_path / "out", tmp_path / "flag"
    append = "import sys, pathlib; p = pathlib.Path(sys.argv[1]) / 'model'; p.mkdir(parents=True, exist_ok=True); "
    val = Command((sys.executable, "-c", f"{append}(p / 'val').touch()", str(out / "one")))
    done = f"pathlib.Path({str(flag)!r}).exists()"
    code = f"{append}f = {done}; (p / ('whole' if f else 'half')).touch(); sys.exit(not f)"
    test = Command((sys.executable, "-c", code, str(out / "one")))
    plan = Plan(out, (Stage("one", "One", (val, test), (out / "one",)),), dict(os.environ))
    with pytest.raises(VITaskError, match=r"One \(2 of 2\): failed"):
        run(plan)
    assert sorted(os.listdir(out / "one/model")) == ["half", "val"]
    flag.touch()
    run(plan)
    assert sorted(os.listdir(out / "one/model")) == ["val", "whole"]


def test_a_checkpoint_that_was_cut_short_is_removed_before_going_on(tmp_path) -> None:
    out = tmp_path / "out"
    code = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1]); r = p.exists(); [(p / n).mkdir(parents=True) "
        "for n in () if r] or r or [(p / n).mkdir(parents=True) for n in ('checkpoint-2', 'checkpoint-4')]; "
        "r or (p / 'checkpoint-2/trainer_state.json').write_text('{}'); sys.exit(not r)"
    )
    one = Stage("one", "One", (Command((sys.executable, "-c", code, str(out / "one"))),), (out / "one",), resumes=True)
    plan = Plan(out, (one,), dict(os.environ))
    with pytest.raises(VITaskError):
        run(plan)
    run(plan)
    assert sorted(os.listdir(out / "one")) == ["checkpoint-2"]


def test_the_script_of_a_plan_does_what_the_plan_does(chain) -> None:
    _, plan = chain
    run(plan(data="it's"))
    made = {name: (plan().out / name / "x").read_text() for name in ("data", "tsm", "vanilla", "vlm")}
    for name in made:
        (plan().out / name / "x").unlink()
    script = plan().out / "commands.sh"
    script.write_text(script_of(plan(data="it's")))
    subprocess.run(["bash", str(script)], check=True)
    assert {name: (plan().out / name / "x").read_text() for name in made} == made
    assert script.read_text().count("\n# ") >= 5


# Side by side ----------------------------------------------------------------------------------------------------

# Says when it begins and ends, and waits in between until all of `others` have begun.
MEET = """
import sys, time, pathlib
out, name, others = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
with open(out / 'order', 'a') as file: file.write(f'+{name} ')
deadline = time.monotonic() + 60
while not all(f'+{one} ' in (out / 'order').read_text() for one in others) and time.monotonic() < deadline:
    time.sleep(0.02)
(out / name).write_text(name)
with open(out / 'order', 'a') as file: file.write(f'-{name} ')
"""


def meeting(out: Path, name: str, *reads: str, others: tuple[str, ...] = ()) -> Stage:
    command = Command((sys.executable, "-c", MEET, str(out), name, *others))
    return Stage(name, name.title(), (command,), (out / name,), reads)


def side_by_side(out: Path, at_once: int) -> Plan:
    """data -> tsm -> vlm with vanilla beside; tsm and vanilla end only if both have begun, where two may run."""
    meets = {"tsm": ("vanilla",), "vanilla": ("tsm",)} if at_once > 1 else {}
    stages = (
        meeting(out, "data"),
        meeting(out, "tsm", "data", others=meets.get("tsm", ())),
        meeting(out, "vlm", "data", "tsm"),
        meeting(out, "vanilla", "data", others=meets.get("vanilla", ())),
        meeting(out, "judged", "vlm", "vanilla"),
    )
    return Plan(out, stages, {"PATH": os.environ["PATH"]}, at_once)


def test_stages_that_do_not_read_each_other_run_side_by_side(tmp_path) -> None:
    ran, printed = run(side_by_side(tmp_path, 2))
    order = (tmp_path / "order").read_text().split()
    assert order[:2] == ["+data", "-data"] and set(order[2:4]) == {"+tsm", "+vanilla"}
    assert order.index("-tsm") < order.index("+vlm") < order.index("-vlm") < order.index("+judged")
    assert order.index("-vanilla") < order.index("+judged")
    assert ran == dict.fromkeys(("data", "tsm", "vanilla", "vlm", "judged"), "not done yet")
    assert printed.count("$ ") == 5 and printed.count("\u2713") == 5
    records = json.loads((tmp_path / "stages.json").read_text())
    assert {name: record["state"] for name, record in records.items()} == dict.fromkeys(ran, "done")
    assert run(side_by_side(tmp_path, 2))[0] == {}


def test_one_at_once_is_the_order_of_the_plan(tmp_path) -> None:
    run(side_by_side(tmp_path, 1))
    names = ("data", "tsm", "vlm", "vanilla", "judged")
    assert (tmp_path / "order").read_text().split() == [word for name in names for word in (f"+{name}", f"-{name}")]


# `slow` takes a minute and `bad` fails as soon as that has begun, both only while the file `flag` is not there.
SLOW = """
import sys, time, pathlib
out, flag = map(pathlib.Path, sys.argv[1:])
(out / 'begun').touch()
while not flag.exists(): time.sleep(0.1)
(out / 'slow').touch()
"""
BAD = """
import sys, time, pathlib
out, flag = map(pathlib.Path, sys.argv[1:])
while not (out / 'begun').exists(): time.sleep(0.02)
(out / 'bad').touch()
sys.exit(not flag.exists())
"""


def failing_beside(out: Path, flag: Path) -> Plan:
    codes = {"slow": SLOW, "bad": BAD}
    commands = {name: Command((sys.executable, "-c", code, str(out), str(flag))) for name, code in codes.items()}
    both = [Stage(name, name.title(), (command,), (out / name,)) for name, command in commands.items()]
    return Plan(out, (*both, meeting(out, "end", "slow", "bad")), {"PATH": os.environ["PATH"]}, 2)


def test_a_failure_stops_what_runs_beside_it_and_the_same_run_goes_on(tmp_path) -> None:
    out, flag, begin = tmp_path / "out", tmp_path / "flag", time.monotonic()
    with pytest.raises(VITaskError, match="Bad: failed with status 1"):
        run(failing_beside(out, flag))
    assert time.monotonic() - begin < 30 and not (out / "slow").exists() and not (out / "end").exists()
    records = json.loads((out / "stages.json").read_text())
    assert {name: record["state"] for name, record in records.items()} == {"slow": "running", "bad": "running"}
    flag.touch()
    assert run(failing_beside(out, flag))[0] == {
        "slow": "was not finished",
        "bad": "was not finished",
        "end": "not done yet",
    }


def test_an_interrupt_stops_all_that_runs(tmp_path) -> None:
    """Two commands that wait for something that never comes."""
    script = (
        "import io, os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from rich.console import Console\n"
        "from test_run_engine import Plan, Engine, meeting\n"
        "out = Path(sys.argv[1]); both = [meeting(out, name, others=('never',)) for name in ('one', 'two')]\n"
        "plan = Plan(out, (*both, meeting(out, 'three', 'one')), dict(os.environ), 2)\n"
        "try: Engine(plan, Console(file=io.StringIO())).run()\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    words = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")})
    deadline = time.monotonic() + 60
    while (not (tmp_path / "order").exists() or (tmp_path / "order").read_text().count("+") < 2) and (
        process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert sorted((tmp_path / "order").read_text().split()) == ["+one", "+two"]
    left = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in left
