"""What our class loads and saves is what the stock class loads and saves."""

import pytest
import torch
import transformers
from hf_models import INSTALLED
from safetensors.torch import load_file

from vitask_plugin.errors import VITaskError
from vitask_plugin.hf import loading
from vitask_plugin.hf.model import with_vitask

pytestmark = pytest.mark.compat


@pytest.mark.parametrize("family", INSTALLED)
def test_every_tensor_is_that_of_the_stock_class(family, tiny_hf, tmp_path):
    """Released folders name tensors as transformers 4 did, which stock classes rename."""
    tiny = tiny_hf(family)
    stock = transformers.AutoModelForImageTextToText.from_pretrained(tiny.folder)
    ours, found = with_vitask(tiny.config).from_pretrained(tiny.folder, output_loading_info=True)
    assert not any(found.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    own = ours.state_dict()
    assert own.keys() == stock.state_dict().keys()
    assert all(torch.equal(own[name], weight) for name, weight in stock.state_dict().items())
    assert type(ours).__name__ == type(stock).__name__ and isinstance(ours, type(stock))
    for name, model in (("ours", ours), ("stock", stock)):
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "stock")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], weight) for name, weight in files[1].items())


def test_weights_that_are_not_there_are_not_drawn(tiny_hf, tmp_path):
    from safetensors.torch import save_file

    tiny = tiny_hf("qwen3_vl")
    for path in tiny.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "mlp" in name and "layers.1" in name)
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(VITaskError, match=r"lack 1 tensors, '.*layers\.1.*' among them"):
        loading.load_model(str(tmp_path), tiny.config, dtype=torch.float32)
