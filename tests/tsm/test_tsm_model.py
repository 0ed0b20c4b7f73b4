"""The TSM: what it gives, that it is frozen, and that a saved one comes back the same or not at all."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_tsm import TASKS, make

from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.backbone import build_timm, timm_options
from vitask_plugin.tsm.model import TSM


def pixels(count: int = 3, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


# (architecture, image side, patches, width of a patch, width of the pooled feature)
ARCHITECTURES = [
    ("test_vit", 32, 4, 64, 64),
    ("test_resnet", 64, 4, 96, 96),
    ("test_mambaout", 64, 4, 64, 256),  # channels last, and a head that widens
    ("deit_tiny_distilled_patch16_224", 32, 4, 192, 192),  # two prefix tokens, two heads
    ("mobilenetv3_small_050", 64, 4, 288, 1024),  # the head widens
    ("pit_ti_224", 64, 0, 256, 256),  # shows its class token only
]


@pytest.mark.parametrize(("arch", "side", "count", "patch_width", "width"), ARCHITECTURES)
def test_output_of_each_kind_of_architecture(arch, side, count, patch_width, width):
    tsm = make(arch, side)
    output = tsm(pixels(3, side))
    assert output.pooled.shape == (3, width)
    assert output.patches.shape == (3, count, patch_width)
    assert torch.equal(output.logits, tsm.backbone.network(pixels(3, side)))
    assert [tsm.record[key] for key in ("feature_width", "patch_count", "patch_width")] == [width, count, patch_width]
    assert tsm.tokens(output, "cls").shape == (3, 1, width)
    if count:
        assert torch.equal(tsm.tokens(output, "all"), output.patches)
    else:
        with pytest.raises(VITaskError, match=r"'pit_ti_224' shows no patch features.*use 'cls'"):
            tsm.tokens(output, "all")


def test_patches_are_the_ones_of_their_place():
    """Channels first, channels last and tokens: patch n is row n // side, column n % side."""
    for arch, side in (("test_resnet", 64), ("test_mambaout", 64), ("test_vit", 32)):
        tsm = make(arch, side)
        features = tsm.backbone.network.forward_features(pixels(1, side))[0]
        patch = tsm(pixels(1, side)).patches[0, 1]
        expected = {"test_resnet": lambda f: f[:, 0, 1], "test_mambaout": lambda f: f[0, 1], "test_vit": lambda f: f[2]}
        assert torch.equal(patch, expected[arch](features))


def test_the_pooled_feature_is_what_the_classifier_reads():
    tsm = make("test_resnet", 64)
    output = tsm(pixels(3, 64))
    torch.testing.assert_close(tsm.backbone.network.get_classifier()(output.pooled), output.logits)


def test_it_is_frozen_and_stays_in_evaluation_mode():
    tsm = make("test_resnet", 64)
    parent = torch.nn.ModuleList([tsm]).train()
    assert parent.training and not any(module.training for module in tsm.modules())
    assert not any(parameter.requires_grad for parameter in tsm.parameters())
    before = tsm.hash
    assert not tsm(pixels(4, 64).requires_grad_()).logits.requires_grad
    assert tsm.hash == before


def test_autocast_around_it_has_no_effect():
    tsm = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tsm(pixels())
    assert all(torch.equal(left, right) for left, right in zip(inside, tsm(pixels()), strict=True))


def test_probabilities_are_over_the_own_classes():
    tsm = make()
    logits = torch.randn(4, 5)
    one, many = tsm.probabilities(logits, "one"), tsm.probabilities(logits, "many")
    torch.testing.assert_close(one, logits[:, :3].exp() / logits[:, :3].exp().sum(1, keepdim=True))
    torch.testing.assert_close(many, 1 / (1 + (-logits[:, 3:]).exp()))
    with pytest.raises(VITaskError, match="knows no task 'other'"):
        tsm.probabilities(logits, "other")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
def test_preprocess_takes_pictures_of_any_mode(mode):
    tsm = make()
    grey = np.tile(np.linspace(0, 255, 20).astype(np.uint8), (10, 1))
    image = Image.fromarray(grey).convert(mode)
    found = tsm.preprocess(image)
    assert found.shape == (3, 32, 32) and found.dtype == torch.float32
    if mode != "1":  # black and white alone
        torch.testing.assert_close(found, tsm.preprocess(Image.fromarray(grey)), atol=0.05, rtol=0)


def test_preprocess_refuses_deep_pixels():
    with pytest.raises(VITaskError, match=r"holds uint16 values \(0 to 65535"):
        make().preprocess(Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)))


def test_preprocess_normalises():
    white = make().preprocess(Image.new("L", (7, 9), 255))
    assert white.unique().tolist() == [2.0]  # (1 - 0.5) / 0.25


def test_saved_and_loaded_is_the_same(tmp_path):
    for arch, side in (("test_vit", 32), ("test_resnet", 64)):
        tsm = make(arch, side)
        tsm.save(tmp_path / arch)
        loaded = TSM.load(tmp_path / arch)
        assert loaded.hash == tsm.hash and loaded.record == tsm.record
        assert list(loaded.record["tasks"]) == ["one", "many"]
        for left, right in zip(tsm(pixels(3, side)), loaded(pixels(3, side)), strict=True):
            assert torch.equal(left, right)


def test_the_hash_changes_with_any_weight_and_any_part_of_the_record():
    tsm = make()
    seen = {tsm.hash}
    for _, parameter in tsm.named_parameters():
        value = parameter.data.view(-1)
        kept = value[-1].item()
        value[-1] += 0.5
        seen.add(tsm.hash)
        value[-1] = kept
    assert len(seen) == 1 + len(list(tsm.parameters())) > 20
    assert tsm.hash in seen
    swapped = dict(reversed(TASKS.items()))
    for change in ({"mean": [0.5, 0.5, 0.4]}, {"std": [0.25, 0.25, 0.2]}, {"tasks": swapped}):
        changed = make(**change).hash
        assert changed not in seen
        seen.add(changed)


def test_weights_that_are_shared_inside_the_network_survive(tmp_path):
    tsm = make()
    blocks = tsm.backbone.network.blocks
    blocks[1].norm1.weight = blocks[0].norm1.weight
    tsm.save(tmp_path)
    assert torch.equal(TSM.load(tmp_path)(pixels()).logits, tsm(pixels()).logits)


def test_a_truncated_file_is_refused(tmp_path):
    make().save(tmp_path)
    weights = tmp_path / "tsm.safetensors"
    whole = weights.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 4, 0):
        weights.write_bytes(whole[:size])
        with pytest.raises(VITaskError, match=r"tsm\.safetensors' are damaged .*; copy or train the TSM again"):
            TSM.load(tmp_path)
    weights.unlink()
    with pytest.raises(VITaskError, match="do not exist; copy the whole TSM folder"):
        TSM.load(tmp_path)
    with pytest.raises(VITaskError, match=r"TSM record '.*nowhere/tsm\.json' does not exist"):
        TSM.load(tmp_path / "nowhere")


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    make().save(tmp_path)
    weights = tmp_path / "tsm.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(bytes(changed))
    with pytest.raises(VITaskError, match="do not belong together or were changed"):
        TSM.load(tmp_path)

    make().save(tmp_path)
    record = json.loads((tmp_path / "tsm.json").read_text())
    record["tasks"]["one"]["choices"] = ["b", "a", "c"]
    (tmp_path / "tsm.json").write_text(json.dumps(record))
    with pytest.raises(VITaskError, match="do not belong together or were changed"):
        TSM.load(tmp_path)

    record["source"] = {"timm": "test_resnet", "options": {}}
    (tmp_path / "tsm.json").write_text(json.dumps(record))
    with pytest.raises(VITaskError, match="do not fit 'test_resnet'"):
        TSM.load(tmp_path)

    for options in ({"checkpoint_path": "weights.pth"}, {"img_size": 32, "pretrained": True}, ["img_size"]):
        record["source"] = {"timm": "test_vit", "options": options}
        (tmp_path / "tsm.json").write_text(json.dumps(record))
        with pytest.raises(VITaskError, match=r"tsm\.json' has the timm options .*; only img_size is allowed"):
            TSM.load(tmp_path)

    good = {**record, "source": {"timm": "test_vit", "options": {}}}
    for changes, sentence in (
        ({"format": 7}, "/format is 7; expected 1"),
        ({"tasks": {}}, r"/tasks is \{\}; expected at least 1 item"),
        (
            {"tasks": {"one": {"choices": ["a", "b"], "multi_label": 0}}},
            "/tasks/one/multi_label is 0; expected true",
        ),
        ({"image_size": 0}, "/image_size is 0; expected greater than"),
        ({"image_size": 10**9}, "/image_size is 1000000000; expected less than"),
        ({"mean": [0.5]}, r"/mean is \[0.5\]; expected at least 3 items"),
        ({"std": [0.5, 0.0, 0.5]}, "/std/1 is 0.0; expected greater than 0"),
        ({"std": [0.5, float("nan"), 0.5]}, "/std/1 is NaN, which JSON does not have"),
        ({"temperature": {"value": -1.0}}, "/temperature/value is -1.0; expected greater than 0"),
        ({"source": {}}, r"/source is \{\}; expected either 'timm' or 'module' in it"),
    ):
        (tmp_path / "tsm.json").write_text(json.dumps(good | changes))
        with pytest.raises(VITaskError, match=f"tsm.json': {sentence}"):
            TSM.load(tmp_path)


def test_a_head_of_another_width_is_refused():
    with pytest.raises(VITaskError, match=r"gives 5 logits, but its tasks, one \(3\), have 3 classes together"):
        make(tasks={"one": TASKS["one"]})


def test_names_and_sizes_that_timm_does_not_have():
    with pytest.raises(VITaskError, match=r"timm has no model 'resnet8'; did you mean resnet"):
        build_timm("resnet8", 2, {})
    with pytest.raises(VITaskError, match="no pretrained weights for 'botnet50ts_256'; leave --pretrained out"):
        build_timm("botnet50ts_256", 2, {}, pretrained=True)
    with pytest.raises(VITaskError, match=r"cannot build 'test_vit.nonsense'.*Invalid pretrained tag"):
        build_timm("test_vit.nonsense", 2, {})
    with pytest.raises(VITaskError, match="patches of 16 pixels, which does not divide --image-size 28"):
        timm_options("test_vit", 2, 28)
    assert timm_options("test_resnet", 2, 28) == {}
    with pytest.raises(VITaskError, match="cannot take a 2x2 RGB image"):
        make("inception_v3", 2)


def test_pretrained_weights_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(VITaskError, match=r"pretrained weights of 'test_vit' cannot be had \(no route\).*--pretrained"):
        build_timm("test_vit", 2, {}, pretrained=True)
