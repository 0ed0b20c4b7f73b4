"""What a recipe becomes: the commands of `--dry-run`, by structure, for both hosts, several sets, GPUs and nodes."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from whole_runs import draw_folder

from vitask_plugin.cli import main
from vitask_plugin.run.engine import script_of
from vitask_plugin.run.plan import make_plan
from vitask_plugin.run.recipe_file import parsed
from vitask_plugin.run.stage import Plan, Stage

OUT = Path("/somewhere/out")
SETS = [{"images": "scans", "modality": "brain MRI"}, {"medmnist": "breast"}, {"medmnist": "retina"}]


def plan(values: dict, device: str = "cpu") -> Plan:
    return make_plan(parsed({"model": "tiny", "data": SETS[:1], **values}), OUT, device)


def stages(found: Plan) -> dict[str, Stage]:
    return {stage.name: stage for stage in found.stages}


def flag(stage: Stage, name: str, command: int = 0) -> str | None:
    words = stage.commands[command].words
    return words[words.index(f"--{name}") + 1] if f"--{name}" in words else None


def test_a_dry_run_prints_every_command_and_writes_nothing(tmp_path, capsys) -> None:
    draw_folder(tmp_path / "scans", 1)
    words = ["--images", str(tmp_path / "scans"), "--modality", "brain MRI", "--model", "tiny", "--baseline"]
    assert main(["run", *words, "--out", str(tmp_path / "out"), "--device", "cpu", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    lines = script.splitlines()
    titles = [line[2:] for line in lines if line.startswith("# ")][1:]
    assert titles == [
        "Data scans written",
        "Tiny model made",
        "TSM trained",
        "TSM features extracted",
        "Vanilla tuning",
        "VITask, stage 1",
        "VITask, stage 2",
        "TSM alone judged",
        "untuned judged",
        "vanilla judged",
        "VITask without EP judged",
        "VITask with EP judged",
        "Report written",
        "Figures and model card written",
    ]
    commands = [shlex.split(line) for line in lines if line and not line.startswith(("#", "set ", "export ", "cd "))]
    programs = [next(word for word in words if "=" not in word) for words in commands]
    assert programs == [
        *("vitask", "python", "vitask", "vitask", "python", "python", "python", "vitask", "vitask"),
        *["lmms-eval"] * 8,
        *("vitask", "python"),
    ]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_each_stage_reads_what_its_command_names() -> None:
    """A path below OUT in a command is an output of a stage that is in `reads`."""
    found = plan({"baseline": True, "data": SETS, "training": {"lora": True}})
    made: dict[str, str] = {}
    for stage in found.stages:
        own = [str(path) for path in stage.outputs]
        text = " ".join(word for command in stage.commands for word in (*command.words, *command.environment.values()))
        named = {name for name, path in made.items() if any(f"{path}{end}" in f"{text} " for end in ("/", ",", " "))}
        assert named - set(stage.reads) == set(), stage.name
        assert set(stage.reads) <= set(made) and (stage.commands and own)
        made[stage.name] = own[0]


def test_both_stages_and_vanilla_differ_in_what_they_should() -> None:
    found = stages(plan({"baseline": True, "seed": 3, "training": {"flags": {"vitask_rda_weight": 2.0, "lora_r": 4}}}))
    first, second, vanilla = found["vitask-stage1"], found["vitask"], found["vanilla"]
    assert [flag(one, "vitask_stage") for one in (first, second, vanilla)] == ["1", "2", None]
    assert flag(second, "vitask_connector_path") == flag(first, "output_dir") == flag(second, "model_name_or_path")
    assert flag(vanilla, "model_name_or_path") == flag(first, "model_name_or_path") == f"{OUT}/tiny/tiny-llava"
    assert [flag(one, "vitask_rda_weight") for one in (first, second, vanilla)] == ["2.0", "2.0", None]
    assert not any("vitask" in word for word in vanilla.commands[0].words if word.startswith("--"))
    assert [flag(one, "num_train_epochs") for one in (first, second, vanilla)] == ["1", "1", "2"]
    assert {flag(one, "seed") for one in (first, second, vanilla, found["tsm"], found["tiny"])} == {"3"}
    assert [flag(one, "lora_r") for one in (first, second, vanilla)] == ["4"] * 3
    assert flag(found["vitask-stage1"], "vitask_features") == flag(found["features"], "out")


def test_a_limit_is_that_of_every_arm() -> None:
    judged = [one for one in plan({"evaluate": {"limit": 3}}).stages if one.name.startswith("judge-")]
    assert len(judged) == 4 and {flag(one, "limit") for one in judged} == {"3"}
    assert {flag(one, "limit") for one in plan({}).stages if one.name.startswith("judge-")} == {None}


def test_an_evaluation_has_to_leave_results_and_the_samples_of_each_task() -> None:
    found = stages(plan({"data": SETS}))
    medmnist = [f"medmnist_{name}{end}" for name in ("breast", "retina") for end in ("", "_score")]
    for stage in (found["judge-vitask"], found["judge-vitask-ep"]):
        left = [command.leaves for command in stage.commands[:2]]
        tasks = (medmnist, ["vitask_folder", "vitask_folder_score"])
        assert left == [("_results.json", *(f"_samples_{task}.jsonl" for task in own)) for own in tasks]


def test_vanilla_is_not_watched_on_data_that_it_does_not_get(tmp_path) -> None:
    """Upstream's Trainer would end with a traceback; and what is watched on is what a stage depends on."""
    watched = {"vitask_eval_data": str(tmp_path / "val.json"), "eval_strategy": "steps", "eval_steps": 5}
    found = stages(plan({"baseline": True, "training": {"flags": {**watched, "load_best_model_at_end": True}}}))
    assert [flag(found[name], "eval_strategy") for name in ("vanilla", "vitask-stage1", "vitask")] == [
        None,
        *["steps"] * 2,
    ]
    assert flag(found["vanilla"], "load_best_model_at_end") is flag(found["vanilla"], "eval_steps") is None
    own = {name for name, stage in found.items() if tmp_path / "val.json" in stage.files}
    assert own == {"vitask-stage1", "vitask"}


def test_files_that_more_flags_name_are_inputs(tmp_path) -> None:
    given = {**SETS[0], "flags": {"window-from": str(tmp_path)}}
    found = stages(plan({"data": [given], "tsm": {"flags": {"init": str(tmp_path / "other")}}}))
    assert tmp_path in found["data-scans"].files and tmp_path / "other" in found["tsm"].files


def test_a_tower_and_a_projector_from_outside_are_inputs(tmp_path, monkeypatch) -> None:
    """By a path that is relative too; a name of the Hub is no file."""
    monkeypatch.chdir(tmp_path)
    for name in ("llava", "tower", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "projector.bin").touch()
    config = {"model_type": "llava_llama", "mm_vision_tower": "tower"}
    (tmp_path / "llava/config.json").write_text(json.dumps(config))
    given = {"pretrain_mm_mlp_adapter": "projector.bin", "vision_tower": "other"}
    found = stages(plan({"model": "llava", "baseline": True, "training": {"flags": given}}))
    for name in ("vanilla", "vitask-stage1", "vitask"):
        assert {tmp_path / one for one in ("llava", "tower", "other", "projector.bin")} <= set(found[name].files)
    assert {tmp_path / "llava", tmp_path / "tower"} <= set(found["judge-untuned"].files)
    (tmp_path / "llava/config.json").write_text(json.dumps({**config, "mm_vision_tower": "openai/clip"}))
    assert stages(plan({"model": "llava"}))["judge-untuned"].files == (tmp_path / "llava",)


def test_the_report_shows_every_model_and_every_training() -> None:
    found = plan({"baseline": True})
    own = stages(found)
    report, trained = own["report"], ("vanilla", "vitask-stage1", "vitask")
    folders = report.commands[0].words[2 : report.commands[0].words.index("--out")]
    assert len(folders) == 5 + 3 and folders[5:] == tuple(str(own[name].outputs[0]) for name in trained)
    assert set(trained) <= set(report.reads)


def test_with_lora_stage_2_continues_the_adapter_of_the_same_model() -> None:
    found = stages(plan({"baseline": True, "training": {"lora": True}}))
    first, second = found["vitask-stage1"], found["vitask"]
    assert flag(second, "model_name_or_path") == flag(first, "model_name_or_path") == f"{OUT}/tiny/tiny-llava"
    assert "lora" in flag(first, "output_dir") and flag(second, "mm_projector_lr") == "2e-05"
    judged = flag(found["judge-vitask-ep"], "model_args")
    assert f"pretrained={OUT}/llava-lora-vitask,model_base={OUT}/tiny/tiny-llava,tsm={OUT}/tsm,ep=True" == judged
    assert "model_base" not in flag(found["judge-untuned"], "model_args")
    # Upstream's own checkpoints of LoRA hold no projector: that run starts anew.
    assert not found["vanilla"].resumes and flag(found["vanilla"], "save_strategy") == "no"
    assert first.resumes and flag(first, "save_strategy") == "steps"


def test_the_hf_host_gets_no_flag_of_llavas() -> None:
    found = stages(plan({"host": "hf", "training": {"lora": True}}))
    words = found["vitask"].commands[0].words
    assert "vitask_plugin.hf.train" in words and not [word for word in words if word.startswith("--mm_")]
    assert flag(found["judge-vitask"], "model") == "vitask_hf"
    assert flag(found["judge-vitask"], "model_args") == f"pretrained={OUT}/hf-lora-vitask"
    assert "vitask_plugin.hf.tiny" in found["tiny"].commands[0].words


def test_a_llava_says_itself_how_it_is_put_together(tmp_path) -> None:
    config = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "linear"}
    model = tmp_path / "llava-v1.5-7b"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**config, "image_aspect_ratio": "anyres"}))
    found = stages(make_plan(parsed({"model": str(model), "data": SETS[:1]}), OUT, "cuda"))
    one = found["vitask-stage1"]
    assert flag(one, "vision_tower") == config["mm_vision_tower"] and flag(one, "mm_projector_type") == "linear"
    assert flag(one, "image_aspect_ratio") == "pad" and flag(one, "bf16") == "True"
    assert flag(one, "use_cpu") is None and "tiny" not in found
    assert model in one.files and model in found["judge-untuned"].files
    assert flag(found["tsm"], "arch").startswith("vit_base") and "--pretrained" in found["tsm"].commands[0].words


@pytest.mark.parametrize(
    ("kind", "tokens", "arms"),
    [("cls", "cls", 2), ("all", "all", 2), ("replace", "all", 2), ("text", None, 2), ("none", None, 1)],
)
def test_the_exemplar_decides_on_features_and_arms(kind, tokens, arms) -> None:
    found = stages(plan({"training": {"flags": {"vitask_ep": kind}}}))
    assert (flag(found["features"], "tokens") if "features" in found else None) == tokens
    assert sum(name.startswith("judge-vitask") for name in found) == arms
    assert (flag(found["vitask"], "vitask_features") is None) == (tokens is None)


def test_a_tsm_that_is_there_is_read_and_not_trained() -> None:
    found = stages(plan({"tsm": {"folder": "tsm/mri"}}))
    assert "tsm" not in found
    for name in ("features", "vitask-stage1", "judge-tsm", "judge-vitask-ep"):
        assert Path("tsm/mri").absolute() in found[name].files, name
    assert Path("tsm/mri").absolute() not in found["judge-vitask"].files


def test_several_sets_are_merged_trained_once_and_judged_one_by_one() -> None:
    found = stages(plan({"data": SETS}))
    assert found["data"].commands[0].words[:3] == ("vitask", "data", "merge")
    for name in ("tsm", "features", "vitask-stage1"):
        assert f"{OUT}/merged/train.json" in found[name].commands[0].words
        assert {"data-scans", "data-breastmnist", "data-retinamnist", "data"} <= set(found[name].reads)
    judged = [dict(command.environment) for command in found["judge-vitask"].commands]
    assert [one.get("MEDMNIST_SPLIT", one.get("VITASK_SPLIT")) for one in judged] == ["val", "val", "test", "test"]
    assert judged[3]["VITASK_FOLDER"] == f"{OUT}/data/scans"
    tasks = flag(found["judge-vitask"], "tasks", 2)
    assert tasks == "medmnist_breast,medmnist_breast_score,medmnist_retina,medmnist_retina_score"


def test_one_sets_duplicates_do_not_allow_those_between_sets(capsys) -> None:
    sets = [{**SETS[0], "drop_duplicates": True}, {**SETS[1], "allow_duplicates": True}]
    found = stages(plan({"data": sets}))
    words = {name: found[name].commands[0].words for name in ("data-scans", "data-breastmnist", "data")}
    given = {name: [word for word in one if word.endswith("-duplicates")] for name, one in words.items()}
    assert given == {"data-scans": ["--drop-duplicates"], "data-breastmnist": ["--allow-duplicates"], "data": []}
    found = stages(plan({"data": sets, "allow_duplicates_between_sets": True}))
    assert "--allow-duplicates" in found["data"].commands[0].words
    words = ["run", "--medmnist", "breastmnist", "--model", "tiny", "--out", str(OUT), "--drop-duplicates"]
    assert main([*words, "--print-recipe"]) == 0
    assert "drop_duplicates: true" in capsys.readouterr().out


def test_a_tables_images_are_looked_for_where_its_flags_say(tmp_path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("image,label\n")
    for flags, folder, suffix in (
        ({}, tmp_path, ""),
        ({"image-folder": str(tmp_path / "x"), "image_suffix": ".jpg"}, tmp_path / "x", ".jpg"),
    ):
        one = plan({"data": [{"images": str(table), "modality": "MRI", "flags": flags}]}).stages[0]
        assert (one.files, one.table, one.suffix) == ((table, folder), table, suffix)
        assert ("--image-suffix" in one.commands[0].words) == bool(suffix)


def test_processes_nodes_and_deepspeed() -> None:
    one = stages(plan({"launch": {"processes": 4, "deepspeed": "zero2"}}, "cuda"))
    assert one["vitask"].commands[0].words[:4] == ("torchrun", "--standalone", "--nproc_per_node", "4")
    assert flag(one["vitask"], "deepspeed").endswith("zero2.json")
    assert one["judge-vitask"].commands[0].words[:6] == (*one["vitask"].commands[0].words[:4], "-m", "lmms_eval")
    nodes = stages(plan({"launch": {"processes": 4, "nodes": 2}}, "cuda"))["vitask"].commands[0].words
    assert nodes[:5] == ("srun", "--nodes", "2", "--ntasks-per-node", "1")
    inner = next(word for word in nodes if "torchrun" in word)
    assert "--nnodes 2 --nproc_per_node 4" in inner and inner.endswith('-m vitask_plugin.llava.train "$@"')


def test_srun_hands_every_flag_to_torchrun(tmp_path) -> None:
    """A stand-in for srun runs what it is given once, one for torchrun prints its words."""
    for name, text in (
        ("srun", 'while [ "$1" != bash ]; do shift; done; exec "$@"'),
        ("torchrun", 'printf "%s\\n" "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    words = stages(plan({"launch": {"nodes": 2}}, "cuda"))["vitask"].commands[0].words
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_NODEID": "1", "MASTER_ADDR": "a", "MASTER_PORT": "9"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    printed = done.stdout.splitlines()
    assert printed[: printed.index("-m")] == [
        *("--nnodes", "2", "--nproc_per_node", "1", "--node_rank", "1", "--master_addr", "a", "--master_port", "9")
    ]
    assert printed[printed.index("-m") + 2 :] == list(words[words.index("task") + 1 :])


def test_a_slurm_job_runs_this_recipe(tmp_path, capsys) -> None:
    draw_folder(tmp_path / "scans", 1)
    job, out = tmp_path / "job.sh", tmp_path / "out"
    words = ["--images", str(tmp_path / "scans"), "--modality", "MRI", "--model", "tiny", "--out", str(out)]
    words += ["--nodes", "2", "--processes", "8", "--device", "cuda", "--set", "launch.hours=3"]
    assert main(["run", *words, "--slurm", str(job)]) == 0
    text = job.read_text()
    for line in ("--nodes=2", "--gpus-per-node=8", "--cpus-per-task=32", "--time=3:00:00", "--ntasks-per-node=1"):
        assert f"#SBATCH {line}\n" in text
    assert text.rstrip().endswith(f"vitask run {out}/recipe.yaml")
    assert subprocess.run(["bash", "-n", str(job)]).returncode == 0
    assert parsed({}) != parsed({"seed": 1})
    assert main(["run", str(out / "recipe.yaml"), "--dry-run"]) == 0
    assert main(["run", *words, "--slurm", str(job)]) == 1 and "is there already" in capsys.readouterr().err


def test_the_script_sets_what_commands_need() -> None:
    text = script_of(plan({"launch": {"environment": {"NCCL_DEBUG": "INFO it"}}}))
    assert "export NCCL_DEBUG='INFO it'\n" in text and "export OMP_NUM_THREADS=1\n" in text
    assert f"\ncd {Path.cwd()}\n" in text and "export CUDA_VISIBLE_DEVICES=''\n" in text and 'bin:"$PATH"' in text


def test_medmnists_folder_is_the_recipes_before_the_users(monkeypatch) -> None:
    """A variable of the recipe stands over the user's own, in every command that reads the files."""
    monkeypatch.setenv("MEDMNIST_ROOT", "/users")
    for given, folder in (({}, "/users"), ({"MEDMNIST_ROOT": "/recipes"}, "/recipes")):
        found = stages(plan({"data": [{"medmnist": "drawn"}], "launch": {"environment": given}}))
        assert found["data-drawn"].files == (Path(folder, "drawn.npz"),)
        for name in ("data-drawn", "judge-vitask", "report"):
            assert found[name].commands[0].environment["MEDMNIST_ROOT"] == folder, name


def test_without_checkpoints_a_training_starts_anew() -> None:
    found = stages(plan({"baseline": True, "training": {"save_steps": None}}))
    for name in ("vanilla", "vitask-stage1", "vitask"):
        assert not found[name].resumes and flag(found[name], "save_strategy") == "no"
        assert flag(found[name], "save_steps") is None
    assert found["tsm"].resumes


def test_a_plan_without_its_conclusions_ends_with_the_judging() -> None:
    recipe = parsed({"model": "tiny", "data": SETS[:1], "launch": {"at_once": 2}})
    whole, part = make_plan(recipe, OUT, "cpu"), make_plan(recipe, OUT, "cpu", concluded=False)
    assert whole.stages[:-2] == part.stages and part.stages[-1].name == "judge-vitask-ep"
    assert (whole.at_once, plan({}).at_once) == (2, 1)
