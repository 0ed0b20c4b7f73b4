"""`vitask connector align`: another TSM's features, given to a tuned VLM's connector as if they were the old one's."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pictures import write_task
from PIL import Image
from trained import make_tsm

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.cli import main
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.method.connector import ExemplarConnector
from vitask_plugin.record import checkpoint, connector_file
from vitask_plugin.record.swap import check_tsm
from vitask_plugin.tsm.features import extract
from vitask_plugin.tsm.imported import import_tsm
from vitask_plugin.tsm.model import TSM

WIDTH = 16  # of an LLM that nobody loads
CHOICES = ["red", "green", "blue"]
# Three classifiers: the second tells what the first tells in another basis and another width, the third something else.
MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, seed, mixed):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.hidden = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 5)
        torch.manual_seed(7)
        self.mix = nn.Linear(5, 9) if mixed else nn.Identity()
        self.classifier = nn.Linear(9 if mixed else 5, 3)

    def forward(self, x):
        x = self.stem(x).relu().mean((2, 3))
        return self.classifier(self.mix(self.hidden(x).tanh()))


def old():
    return Net(0, False)


def new():
    return Net(0, True)


def third():
    return Net(3, False)
"""


def tree_hash(directory: Path) -> dict[str, str]:
    return {str(path): sha256_file(path) for path in sorted(directory.rglob("*")) if path.is_file()}


def make_checkpoint(directory: Path, tsm: TSM, ep: str = "cls", kind: str = "mlp2x_gelu") -> Path:
    """What `align` reads of a checkpoint: its connector and its record. Its weights would be beside them."""
    width = tsm.record["feature_width" if ep in ("cls", "text") else "patch_width"]
    torch.manual_seed(1)
    connector = None if ep == "text" else ExemplarConnector(kind, width, WIDTH)
    directory.mkdir()
    if connector is not None:
        connector_file.save_connector(connector, connector.state_dict(), directory)
    flags = VITaskArguments(vitask=True, vitask_ep=ep, vitask_tsm="tsm/old", vitask_connector=kind)
    tasks = {"colour": {"choices": CHOICES}}
    checkpoint.save_record(directory, flags, connector, {"hash": tsm.hash, "width": width}, tasks, "v1")
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures, the three TSMs, and a checkpoint that was tuned with the first."""
    root = tmp_path_factory.mktemp("align")
    (root / "nets.py").write_text(MODULE)
    write_task(root, "colour", CHOICES, 60)
    write_task(root, "colour", CHOICES, 9, split="val")
    statistics = {"image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        for name in ("old", "new", "third"):
            import_tsm(root / name, [root / "colour-train.json"], module=f"nets:{name}", **statistics)
        found = {name: TSM.load(root / name, trust_code=True) for name in ("old", "new", "third")}
        yield SimpleNamespace(root=root, **found, checkpoint=make_checkpoint(root / "llava", found["old"]))
    sys.modules.pop("nets", None)


def command(made, output: Path, *words: object, old: str = "old", new: str = "new", trust: bool = True) -> list[str]:
    flags = {
        "checkpoint": made.checkpoint,
        "from-tsm": made.root / old,
        "tsm": made.root / new,
        "data": made.root / "colour-train.json",
        "image-folder": made.root / "images",
        "out": output,
        "device": "cpu",
    }
    for name, value in zip(words[::2], words[1::2], strict=True):
        flags.pop({"features-from": "from-tsm", "features": "tsm"}.get(name, ""), None)
        flags[name] = value
    trusted = ["--trust-tsm-code"] if trust else []
    return ["connector", "align", *(str(w) for n, v in flags.items() for w in (f"--{n}", v)), *trusted]


def pooled(made, tsm: TSM, split: str = "val") -> torch.Tensor:
    """[n, F], image by image."""
    folder = made.root / "images" / f"colour-{split}"
    return torch.cat([tsm(tsm.preprocess(Image.open(path))[None]).pooled for path in sorted(folder.iterdir())])


@pytest.fixture(scope="module")
def aligned(made, tmp_path_factory):
    output, before = tmp_path_factory.mktemp("aligned") / "out", tree_hash(made.checkpoint)
    assert main(command(made, output)) == 0
    assert tree_hash(made.checkpoint) == before
    return output


def test_unseen_images_get_the_exemplars_that_the_old_tsm_gave(made, aligned):
    own, new = connector_file.load_connector(made.checkpoint), connector_file.load_connector(aligned)
    assert (own.in_features, new.in_features) == (5, 9)
    with torch.no_grad():
        expected, found = own(pooled(made, made.old)), new(pooled(made, made.new))
    difference = (found - expected).abs().max()
    assert difference < 0.02 * (expected - expected.mean(0)).abs().max()


def test_the_record_says_whose_it_is_and_how_good(made, aligned):
    assert sorted(path.name for path in aligned.iterdir()) == ["vitask.json", "vitask_connector.safetensors"]
    record = json.loads((aligned / "vitask.json").read_text())
    assert record["tsm"] == {"hash": made.new.hash, "width": 9}
    own = sha256_file(aligned / "vitask_connector.safetensors")
    assert record["connector"] == {"kind": "mlp2x_gelu", "in": 9, "out": WIDTH, "sha256": own}
    assert record["tasks"] == {"colour": CHOICES} and record["ep"] == "cls"
    fitted = record["fitted"]
    assert fitted["tsm"] == made.old.hash and fitted["identity"] == checkpoint.identity(made.checkpoint)
    (step,) = fitted["aligned"]
    assert (step["from"], step["images"], step["width"]) == (made.old.hash, 60, 9) and step["r2"] > 0.999
    read = checkpoint.read_fitted(aligned, made.checkpoint)
    assert check_tsm(read, made.new) is None
    with pytest.raises(VITaskError, match="its features are 5 wide where the connector takes 9"):
        check_tsm(read, made.old)


def test_another_tsm_says_less_and_the_command_says_so(made, tmp_path, capsys):
    """Held-out R2 by hand: each fifth from the others, at the recorded strength."""
    assert main(command(made, tmp_path / "out", new="third")) == 0
    printed = capsys.readouterr().out
    (step,) = json.loads((tmp_path / "out" / "vitask.json").read_text())["fitted"]["aligned"]
    new, old = (pooled(made, tsm, "train").double() for tsm in (made.third, made.old))
    error = spread = 0.0
    for number in range(5):
        held = torch.arange(60) % 5 == number
        x, y = new[~held] - new[~held].mean(0), old[~held] - old[~held].mean(0)
        penalty = step["strength"] * x.square().sum() / 5 * torch.eye(5, dtype=torch.float64)
        weight = torch.linalg.solve(x.T @ x + penalty, x.T @ y)
        predicted = (new[held] - new[~held].mean(0)) @ weight + old[~held].mean(0)
        error += (predicted - old[held]).square().sum().item()
        spread += (old[held] - old[~held].mean(0)).square().sum().item()
    assert step["r2"] == pytest.approx(1 - error / spread, abs=1e-4) and step["r2"] < 0.999
    assert f"R2 {step['r2']:.3f} on held-out images" in printed and "aligned on 60 images" in printed
    assert f"connector={tmp_path / 'out'},tsm={made.root / 'third'}" in printed


@pytest.mark.parametrize(
    ("r2", "tokens", "said", "unsaid"),
    [
        (0.6, 10, "expect about the accuracy with the old TSM", "few images"),
        (0.3, 900, "low: expect some of the accuracy with the old TSM to be lost", "few images"),
        (0.3, 10, "few images for features 512 wide", "very low"),
        (0.1, 900, "very low: the new TSM says little", "few images"),
        (-0.2, 900, "answers worse than without an exemplar", "few images"),
    ],
)
def test_what_to_expect(r2, tokens, said, unsaid):
    from vitask_plugin.training.align import expectation

    words = expectation({"r2": r2, "tokens": tokens, "width": 512})
    assert said in words and unsaid not in words


def test_an_alignment_of_an_alignment(made, aligned, tmp_path):
    words = ("connector", aligned)
    assert main(command(made, tmp_path / "out", *words, old="new", new="old")) == 0
    record = checkpoint.read_fitted(tmp_path / "out", made.checkpoint)
    assert [step["from"] for step in record["fitted"]["aligned"]] == [made.old.hash, made.new.hash]
    assert record["fitted"]["tsm"] == record["tsm"]["hash"] == made.old.hash
    own, back = connector_file.load_connector(made.checkpoint), connector_file.load_connector(tmp_path / "out")
    with torch.no_grad():  # there and back again
        expected, found = own(pooled(made, made.old)), back(pooled(made, made.old))
    assert (found - expected).abs().max() < 0.02 * (expected - expected.mean(0)).abs().max()


def test_features_that_were_kept_do_in_place_of_a_tsm(made, aligned, tmp_path):
    for name in ("old", "new"):
        data, images = [made.root / "colour-train.json"], made.root / "images"
        extract(made.root / name, data, images, tmp_path / name, trust_code=True)
    # Nothing is loaded that needs to be trusted.
    words = ("features-from", tmp_path / "old", "features", tmp_path / "new")
    assert main(command(made, tmp_path / "out", *words, trust=False)) == 0
    found, expected = (connector_file.load_connector(folder).state_dict() for folder in (tmp_path / "out", aligned))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert checkpoint.read_record(tmp_path / "out")["tsm"]["hash"] == made.new.hash


def test_images_are_enough(made, aligned, tmp_path):
    """No labels, no answers; a file twice, under two names, and a sample twice change nothing."""
    samples = json.loads((made.root / "colour-train.json").read_text())
    shutil.copytree(made.root / "images", tmp_path / "images")
    names = [sample["image"] for sample in samples]
    shutil.copy(tmp_path / "images" / names[3], tmp_path / "images" / "again.png")
    bare = [{"image": name} for name in [*names[:5], names[0], "again.png", *names[5:]]]
    (tmp_path / "bare.json").write_text(json.dumps([*bare, {"id": "text only"}]))
    words = ("data", tmp_path / "bare.json", "image-folder", tmp_path / "images")
    assert main(command(made, tmp_path / "out", *words)) == 0
    found, expected = (connector_file.load_connector(folder).state_dict() for folder in (tmp_path / "out", aligned))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # General images beside task images are left out: an exemplar is not made for them.
    (tmp_path / "mixed.json").write_text(json.dumps([{"image": "missing.png"}, *samples]))
    words = ("data", tmp_path / "mixed.json")
    assert main(command(made, tmp_path / "mixed", *words)) == 0
    (step,) = checkpoint.read_record(tmp_path / "mixed")["fitted"]["aligned"]
    assert step["images"] == 60


@pytest.mark.parametrize("ep", ["all", "replace"])
def test_patches_are_aligned_one_by_one(ep, drawn_data, tmp_path):
    tsms = {name: make_tsm(tmp_path / name, seed=seed) for name, seed in (("old", 0), ("new", 1))}
    make_tsm(tmp_path / "finer", image_size=64)
    directory = make_checkpoint(tmp_path / "llava", tsms["old"], ep, "linear")
    words = ["connector", "align", "--checkpoint", directory, "--from-tsm", tmp_path / "old", "--device", "cpu"]
    words += ["--data", drawn_data / "train.json", "--image-folder", drawn_data / "images"]
    assert main([*map(str, words), "--tsm", str(tmp_path / "new"), "--out", str(tmp_path / "out")]) == 0
    (step,) = checkpoint.read_record(tmp_path / "out")["fitted"]["aligned"]
    assert (step["images"], step["tokens"]) == (24, 24 * tsms["old"].record["patch_count"])
    with pytest.raises(VITaskError, match=r"gives 16 patches per image, the old one 4, .*use a TSM with 4 patches"):
        from vitask_plugin.training.align import align_connector

        align_connector(
            directory,
            drawn_data / "train.json",
            drawn_data / "images",
            tmp_path / "finer-out",
            old=tmp_path / "old",
            new=tmp_path / "finer",
            device="cpu",
        )
    assert not (tmp_path / "finer-out").exists()


def test_images_unlike_those_of_training_are_refused(made, tmp_path, capsys):
    """They are 32x32, and the file beside the data says: 8 bits. One of the three was trained on something else."""
    root = shutil.copytree(made.root, tmp_path / "root", ignore=shutil.ignore_patterns("nets.py", "__pycache__"))
    (root / "labels.json").write_text(json.dumps({"task": "colour", "choices": CHOICES, "pixels": {}}))
    bare = [{"image": sample["image"]} for sample in json.loads((root / "colour-train.json").read_text())]
    (root / "bare.json").write_text(json.dumps(bare))
    (root / "broken-block.json").write_text(json.dumps([{**one, "vitask": 5} for one in bare]))
    large = {"width": [224, 224], "height": [224, 224], "images": 9}
    deep = {"width": [32, 32], "height": [32, 32], "images": 9, "pixels": {"window": [0, 4095]}}
    cases = [
        (large, "224x224 images of task 'colour', those of", "are 32x32", ("colour-train", "bare", "broken-block")),
        (deep, "through the window 0 to 4095 of task 'colour', those of", "are through no window", ("colour-train",)),
    ]
    made = SimpleNamespace(root=root, checkpoint=root / "llava", old=made.old, new=made.new)
    records = {"checkpoint": "llava/vitask.json", "TSM " + made.old.hash[:12]: "old/tsm.json"}
    records["TSM " + made.new.hash[:12]] = "new/tsm.json"
    for who, record in records.items():
        before = (root / record).read_text()
        for entry, trained, used, names in cases:
            (root / record).write_text(json.dumps({**json.loads(before), "images": {"colour": entry}}))
            for name in names:
                words = command(made, tmp_path / "out", "data", root / f"{name}.json")
                assert main(words) == 1
                said = capsys.readouterr().err.strip().splitlines()[-1]
                assert f"error: {who}" in said and trained in said and used in said and "--any-image-size" in said
                assert not (tmp_path / "out").exists()
        assert main([*words, "--any-image-size"]) == 0
        shutil.rmtree(tmp_path / "out")
        (root / record).write_text(before)
    assert main(words) == 0


@pytest.mark.parametrize("images", [{"colour": {}}, {"colour": {"width": [9, 9], "height": [9, 9], "pixels": 5}}, [1]])
def test_a_damaged_record_of_images_is_a_sentence(images, made, tmp_path, capsys):
    checkpoint = shutil.copytree(made.checkpoint, tmp_path / "llava")
    record = json.loads((checkpoint / "vitask.json").read_text())
    (checkpoint / "vitask.json").write_text(json.dumps(record | {"images": images}))
    assert main(command(made, tmp_path / "out", "checkpoint", checkpoint)) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "vitask.json': /images" in said and said.endswith("or upgrade vitask-plugin if a later one wrote it")


def test_bad_input_is_one_sentence_and_leaves_nothing(made, aligned, tmp_path, capsys):
    few = json.loads((made.root / "colour-train.json").read_text())[:9]
    (tmp_path / "few.json").write_text(json.dumps(few))
    rows = json.loads((made.root / "colour-train.json").read_text())
    several = [*rows[:9], {**rows[9], "image": [rows[9]["image"], rows[10]["image"]]}, *rows[10:]]
    (tmp_path / "several.json").write_text(json.dumps(several))
    (tmp_path / "bare.json").write_text(json.dumps([{"id": row["id"], "image": row["image"]} for row in several]))
    lacking = {name: value for name, value in rows[0].items() if name != "image"}
    (tmp_path / "lacking.json").write_text(json.dumps([*rows, lacking]))
    (tmp_path / "none.json").write_text(json.dumps([{"id": 1}]))
    extract(made.root / "old", [made.root / "colour-val.json"], made.root / "images", tmp_path / "val", trust_code=True)
    text = make_checkpoint(tmp_path / "text", made.old, "text")
    (tmp_path / "plain").mkdir()
    output = tmp_path / "out"
    cases = [
        (command(made, output, old="third"), f"was made for TSM {made.old.hash[:12]}, and the old TSM given is"),
        (command(made, output, new="old"), "there is nothing to align"),
        (command(made, output, "connector", aligned), f"was made for TSM {made.new.hash[:12]}"),
        (command(made, output, "connector", made.checkpoint), "holds no connector that `vitask connector align`"),
        (command(made, output, "data", tmp_path / "few.json"), "9 different images, and an alignment needs 10"),
        (command(made, output, "data", tmp_path / "none.json"), "is no list of samples with an 'image'"),
        (command(made, output, "data", tmp_path / "several.json"), f"sample 9 (id {rows[9]['id']!r}): 'image' is ['"),
        (command(made, output, "data", tmp_path / "bare.json"), f"sample 9 (id {rows[9]['id']!r}): 'image' is ['"),
        (command(made, output, "data", tmp_path / "lacking.json"), "'image' is None; expected one path relative to"),
        (command(made, output, "image-folder", tmp_path), "colour-train/000.png"),
        (command(made, output, "features-from", tmp_path / "val"), "hold nothing for image 'colour-train/000.png'"),
        (command(made, output, "checkpoint", text), "--vitask_ep text, so it takes any TSM as it is"),
        (command(made, output, "checkpoint", tmp_path / "plain"), "has no vitask.json"),
        (command(made, made.root), "is not an earlier output of this command"),
        (command(made, output, "batch-size", 0), "--batch-size is 0"),
    ]
    before = tree_hash(made.root)
    for words, sentence in cases:
        assert main(words) == 1, sentence
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("vitask: error: ") and sentence in said, said
        assert not output.exists() and tree_hash(made.root).items() >= before.items()
