"""Networks: what they are equivariant to, and that forward and precoder are the same thing."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra xccl[precoder] is not installed")

from precoder.channel import Channels, Scenario, draw, generator  # noqa: E402
from precoder.edge_layer import EdgeLayer, _EdgeLinear  # noqa: E402
from precoder.rate import rate_of_precoder, weighted_sum_rate  # noqa: E402
from precoder.registry import build, names  # noqa: E402

USERS, ANTENNAS = 4, 6
UNITARY = ["upe-phase", "upe", "upe-literal"]


def network_of(name: str) -> torch.nn.Module:
    """Random parameters, also where training starts near zero: otherwise nearly a matched filter would be tested."""
    torch.manual_seed(0)
    network = build(name, ANTENNAS).double()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.abs().max() < 0.2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def channels_of(antennas: int = ANTENNAS, users: int = USERS) -> Channels:
    return draw(Scenario(users, antennas, (0, 20)), 10, generator(0, 0))


def distance(name: str, changed: Channels, expected: torch.Tensor) -> float:
    with torch.no_grad():
        return float((network_of(name).precoder(changed) - expected).abs().max())


def precoder(name: str) -> torch.Tensor:
    with torch.no_grad():
        return network_of(name).precoder(channels_of())


def rotated(h: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(h.shape[0], h.shape[1], h.shape[1], dtype=h.dtype))[0]


@pytest.mark.parametrize("name", names())
def test_permutation_of_users(name: str) -> None:
    channels, order = channels_of(), torch.tensor([2, 0, 3, 1])
    changed = Channels(channels.h[:, :, order], channels.alpha[:, order])
    assert distance(name, changed, precoder(name)[:, :, order]) < 1e-10


@pytest.mark.parametrize("name", names())
def test_rotation_of_antennas(name: str) -> None:
    channels = channels_of()
    u = rotated(channels.h)
    difference = distance(name, Channels(u @ channels.h, channels.alpha), u @ precoder(name))
    assert difference < 1e-10 if name in UNITARY else difference > 1e-3


@pytest.mark.parametrize("name", names())
def test_phases_of_users(name: str) -> None:
    channels = channels_of()
    phases = torch.exp(1j * torch.rand(10, 1, USERS, dtype=torch.float64) * 6.28)
    difference = distance(name, Channels(channels.h * phases, channels.alpha), precoder(name) * phases)
    assert difference < 1e-10 if name == "upe-phase" else difference > 1e-3


@pytest.mark.parametrize("name", ["edge-gnn", "model-gnn"])
def test_permutation_of_antennas(name: str) -> None:
    channels, order = channels_of(), torch.randperm(ANTENNAS)
    changed = Channels(channels.h[:, order], channels.alpha)
    assert distance(name, changed, precoder(name)[:, order]) < 1e-10


@pytest.mark.parametrize("name", names())
def test_precoder_has_unit_power_and_the_rate_of_forward(name: str) -> None:
    channels = channels_of()
    with torch.no_grad():
        v = network_of(name).precoder(channels)
        gains = network_of(name)(channels)
    torch.testing.assert_close(v.abs().square().sum((1, 2)), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(
        rate_of_precoder(channels.h, v, channels.alpha), weighted_sum_rate(gains, channels.alpha), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("name", [n for n in names() if n != "transformer"])
@pytest.mark.parametrize(("antennas", "users"), [(9, 5), (2, 3), (4, 1)])
def test_other_sizes_work(name: str, antennas: int, users: int) -> None:
    with torch.no_grad():
        assert network_of(name).precoder(channels_of(antennas, users)).isfinite().all()


def test_transformer_is_for_one_number_of_antennas() -> None:
    with pytest.raises(ValueError, match=r"for 6 antennas, got channels of 9"):
        network_of("transformer").precoder(channels_of(9))


def test_unknown_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"upe-phase.*got 'mlp'"):
        build("mlp", 8)


def naive_edge_layer(layer: EdgeLayer, z: torch.Tensor) -> torch.Tensor:
    """The formula of EdgeLayer's docstring, element by element."""
    out = layer.bias.shape[0]
    own, turned = layer.edge[:, :out], layer.edge[:, out:]
    row, column, diagonal = layer.node.split(out, 1)
    y = torch.zeros(*z.shape[:3], out, dtype=z.dtype)
    for b in range(len(z)):
        nodes = [torch.cat([z[b, i].mean(0), z[b, :, i].mean(0), z[b, i, i]]) for i in range(z.shape[1])]
        for i, ni in enumerate(nodes):
            for j, nj in enumerate(nodes):
                y[b, i, j] = z[b, i, j] @ own + z[b, j, i] @ turned + ni @ row + nj @ column
                y[b, i, j] += z[b].mean((0, 1)) @ layer.graph + layer.bias
                if i == j:
                    y[b, i, j] += ni @ diagonal
    return y


def test_edge_layer_is_its_formula() -> None:
    torch.manual_seed(0)
    layer = EdgeLayer(5, 3).double()
    torch.nn.init.normal_(layer.bias)
    z = torch.randn(2, 4, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(z), naive_edge_layer(layer, z))


def test_edge_layer_gradients() -> None:
    shapes = [(2, 3, 3, 4), (4, 10), (12, 15), (4, 5), (5,)]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(_EdgeLinear.apply, inputs)
