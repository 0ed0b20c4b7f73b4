"""The exemplar connector and the learned prefix: what they compute, what they refuse, and their file."""

import math

import pytest
import safetensors.torch
import torch
from torch import Tensor

from vitask_plugin.arguments import CONNECTOR_KINDS, VITaskArguments
from vitask_plugin.errors import VITaskError
from vitask_plugin.method.connected import Connected
from vitask_plugin.method.connector import LEARNED, ExemplarConnector, LearnedPrefix, build_connector

FEATURES, WIDTH = 6, 10
kinds = pytest.mark.parametrize("kind", CONNECTOR_KINDS)


def connector(kind: str) -> ExemplarConnector:
    torch.manual_seed(3)
    return ExemplarConnector(kind, FEATURES, WIDTH)


def by_hand(kind: str, weights: dict[str, Tensor], features: Tensor) -> Tensor:
    """x W' + b, and for the two-layer kind x Phi(x) between two of them, in float64."""
    (first, first_bias), *rest = [
        (weights[name].double(), weights[name.replace("weight", "bias")].double())
        for name in sorted(weights)
        if name.endswith("weight")
    ]
    hidden = features.double() @ first.T + first_bias
    for weight, bias in rest:
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        hidden = hidden @ weight.T + bias
    assert len(rest) == {"linear": 0, "mlp2x_gelu": 1}[kind]
    return hidden


def test_the_kinds():
    assert CONNECTOR_KINDS == ("linear", "mlp2x_gelu")


@kinds
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 5), (0, 1)], ids=str)
def test_it_maps_features_of_any_leading_shape(kind, shape):
    module = connector(kind)
    features = torch.randn(*shape, FEATURES, generator=torch.Generator().manual_seed(4))
    tokens = module(features)
    assert tokens.shape == (*shape, WIDTH)
    expected = by_hand(kind, module.state_dict(), features)
    torch.testing.assert_close(tokens.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_two_kinds_differ():
    shapes = {kind: [tuple(p.shape) for p in connector(kind).parameters()] for kind in CONNECTOR_KINDS}
    assert shapes["linear"] == [(WIDTH, FEATURES), (WIDTH,)]
    assert shapes["mlp2x_gelu"] == [(WIDTH, FEATURES), (WIDTH,), (WIDTH, WIDTH), (WIDTH,)]


@kinds
def test_every_weight_gets_a_gradient(kind):
    module = connector(kind)
    module(torch.randn(2, 3, FEATURES)).pow(2).sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in module.parameters())


@kinds
def test_features_take_the_dtype_of_the_weights(kind):
    module = connector(kind).to(torch.bfloat16)
    assert module(torch.randn(2, FEATURES)).dtype == torch.bfloat16


def test_an_unknown_kind_is_refused():
    with pytest.raises(VITaskError) as error:
        ExemplarConnector("mlp9x_gelu", FEATURES, WIDTH)
    assert "mlp9x_gelu" in str(error.value)
    assert all(kind in str(error.value) for kind in CONNECTOR_KINDS)


@kinds
@pytest.mark.parametrize("width", [FEATURES - 1, FEATURES + 1, WIDTH, 1])
def test_features_of_another_width_are_refused_with_both_named(kind, width):
    with pytest.raises(VITaskError) as error:
        connector(kind)(torch.zeros(2, 1, width))
    words = str(error.value).replace(",", " ").replace(";", " ").split()
    assert str(width) in words and str(FEATURES) in words


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_bit_for_bit(kind, dtype, tmp_path):
    from vitask_plugin.model_folder import CONNECTOR_FILE
    from vitask_plugin.record.connector_file import has_connector, load_connector, save_connector

    assert not has_connector(tmp_path)
    module = connector(kind).to(dtype)
    with torch.no_grad():
        for weight in module.parameters():  # not what a fresh connector would hold
            weight.add_(torch.randn(weight.shape).to(dtype))
    save_connector(module, module.state_dict(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CONNECTOR_FILE]
    assert has_connector(tmp_path)

    loaded = load_connector(tmp_path)
    assert (loaded.kind, loaded.in_features, loaded.out_features) == (kind, FEATURES, WIDTH)
    saved = module.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, saved[name].float()), name
    if dtype == torch.float32:
        features = torch.randn(2, FEATURES)
        assert torch.equal(loaded(features), module(features))


def test_the_learned_prefix_is_one_token_whatever_is_asked():
    torch.manual_seed(3)
    prefix = build_connector(LEARNED, 0, WIDTH)
    assert [tuple(weight.shape) for weight in prefix.parameters()] == [(WIDTH,)]
    for shape in ((), (1,), (3, 1), (2, 5), (0, 1)):
        tokens = prefix(torch.zeros(*shape, 0))
        assert torch.equal(tokens, prefix.token.expand(*shape, WIDTH))
    prefix(torch.zeros(3, 1, 0)).sum().backward()
    assert torch.equal(prefix.token.grad, torch.full((WIDTH,), 3.0))
    large = LearnedPrefix(100_000).token  # as Llama's word embeddings: normal, standard deviation 0.02
    assert float(large.std()) == pytest.approx(0.02, rel=0.02) and abs(float(large.mean())) < 1e-3


def test_the_learned_prefix_refuses_features():
    with pytest.raises(VITaskError, match=f"are {FEATURES} wide, but this exemplar was learned without a TSM"):
        LearnedPrefix(WIDTH)(torch.zeros(2, 1, FEATURES))


def test_the_learned_prefix_is_saved_and_loaded_bit_for_bit(tmp_path):
    from vitask_plugin.record.connector_file import load_connector, save_connector

    prefix = LearnedPrefix(WIDTH)
    save_connector(prefix, prefix.state_dict(), tmp_path)
    loaded = load_connector(tmp_path)
    assert isinstance(loaded, LearnedPrefix) and torch.equal(loaded.token, prefix.token)


@pytest.mark.parametrize(
    "kept", [0, 4, 60, -1], ids=lambda kept: f"first {kept} bytes" if kept >= 0 else "one byte lost"
)
def test_a_truncated_file_is_refused(kept, tmp_path):
    from vitask_plugin.model_folder import CONNECTOR_FILE
    from vitask_plugin.record.connector_file import load_connector, save_connector

    module = connector("mlp2x_gelu")
    save_connector(module, module.state_dict(), tmp_path)
    path = tmp_path / CONNECTOR_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(VITaskError, match=CONNECTOR_FILE):
        load_connector(tmp_path)


def foreign_files() -> dict[str, tuple[dict[str, Tensor], dict[str, str] | None]]:
    weights = connector("linear").state_dict()
    shape = {"kind": "linear", "in": str(FEATURES), "out": str(WIDTH)}
    return {
        "no metadata": (weights, None),
        "another kind": (weights, shape | {"kind": "mlp2x_gelu"}),
        "an unknown kind": (weights, shape | {"kind": "mlp9x_gelu"}),
        "another width": (weights, shape | {"in": str(FEATURES + 1)}),
        "no number": (weights, shape | {"out": "wide"}),
        "a weight too few": ({"layers.0.weight": weights["layers.0.weight"]}, shape),
        "a weight too many": (weights | {"more": torch.zeros(1)}, shape),
    }


@pytest.mark.parametrize("case", foreign_files())
def test_a_foreign_file_is_refused(case, tmp_path):
    from vitask_plugin.model_folder import CONNECTOR_FILE
    from vitask_plugin.record.connector_file import load_connector

    weights, metadata = foreign_files()[case]
    safetensors.torch.save_file(weights, tmp_path / CONNECTOR_FILE, metadata)
    with pytest.raises(VITaskError, match=CONNECTOR_FILE):
        load_connector(tmp_path)


def test_an_absent_file_is_refused(tmp_path):
    from vitask_plugin.record.connector_file import load_connector

    with pytest.raises(VITaskError) as error:
        load_connector(tmp_path)
    assert str(tmp_path) in str(error.value)


class Plain(torch.nn.Module):
    def __init__(self, config: int) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(5, config)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.words


class WithConnector(Connected, Plain):
    """As a host's model."""


def test_a_model_has_exemplars_once_it_is_connected() -> None:
    model = WithConnector(WIDTH)
    assert [name for name, _ in model.named_parameters()] == ["words.weight"]
    with pytest.raises(RuntimeError, match="connect"):
        model.exemplars(torch.zeros(1, 2, FEATURES))
    model.connect(VITaskArguments(vitask=True, vitask_tsm="tsm", vitask_ep="text"), None)
    ids = torch.tensor([[1, 4]])
    assert torch.equal(model.exemplars(ids), model.words.weight[ids])
    own, features = connector("linear"), torch.randn(1, 2, FEATURES)
    model.connect(VITaskArguments(vitask=True, vitask_tsm="tsm", vitask_ep="all"), own)
    assert torch.equal(model.exemplars(features), own(features))
    assert any(name.startswith("vitask_connector.") for name, _ in model.named_parameters())
