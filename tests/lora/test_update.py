"""The accumulated update stays exact and bounded over many rounds, and one patch brings any client up to date."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsplitlora_flwr.lora.aggregation import Factors, aggregate
from hsplitlora_flwr.lora.export import load_update, save_update
from hsplitlora_flwr.lora.update import BASE, AccumulatedUpdate, Patch, UpdateError, pack, recompress, unpack

# Dense after a few rounds, but for the last one, which is trained in few rounds and has room for rank 80.
SHAPES = {"square": (24, 24), "wide": (8, 64), "tall": (64, 8), "roomy": (160, 160)}


def pair(generator: torch.Generator, shape: tuple[int, int], rank: int, scale: float = 1.0) -> Factors:
    b, a = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    return scale * b, a


def product(factors: Factors) -> Tensor:
    return factors[0].double() @ factors[1].double()


def error(accumulated: AccumulatedUpdate, expected: dict[str, Tensor]) -> float:
    """Largest relative error of a layer, in the Frobenius norm."""
    return max(
        float(torch.linalg.norm(change.dense().double() - expected[name]) / torch.linalg.norm(expected[name]))
        for name, change in accumulated.changes().items()
    )


def same(client: AccumulatedUpdate, server: AccumulatedUpdate) -> bool:
    """Whether two stores hold the same layers, bit by bit."""
    mine, theirs = pack(client.changes()), pack(server.changes())
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def over_the_wire(patch: Patch) -> Patch:
    tensors, text = patch.pack()
    return Patch.unpack({key: tensor.clone() for key, tensor in tensors.items()}, dict(text))


def check_bytes(patch: Patch, server: AccumulatedUpdate) -> None:
    for name, layer in patch.layers.items():
        sent = sum(update.nbytes for update in layer.updates)
        assert sent <= server.changes()[name].nbytes <= 4 * math.prod(SHAPES[name])


def test_fifty_rounds_with_clients_that_come_and_go() -> None:
    generator, chance = torch.Generator().manual_seed(0), random.Random(0)
    expected = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    server, clients = AccumulatedUpdate(), [AccumulatedUpdate() for _ in range(6)]
    presence = [1.0, 0.7, 0.4, 0.2, 0.05, 0.0]
    differences_beside_dense, missed = 0, set()
    for version in range(1, 51):
        updates = []
        for _ in range(chance.randint(1, 3)):  # each with the ranks of its own, on layers of its own
            trained = [name for name in SHAPES if chance.random() < (0.1 if name == "roomy" else 0.8)]
            updates.append({name: pair(generator, SHAPES[name], chance.randint(1, 8), 0.1) for name in trained})
        weights = [chance.uniform(1, 100) for _ in updates]
        for weight, update in zip(weights, updates, strict=True):
            for name, factors in update.items():
                expected[name] += weight / sum(weights) * product(factors)
        server.add(aggregate(updates, weights))
        assert server.version == version
        assert error(server, expected) < 1e-6
        for layer in server._layers.values():
            assert sum(update.nbytes for update in layer.updates) < 4 * math.prod(layer.change.shape)
        for client, present in zip(clients, presence, strict=True):
            if chance.random() < present or version == 50:
                missed.add(version - client.version - 1)
                patch = over_the_wire(server.since(client.held()))
                check_bytes(patch, server)
                differences_beside_dense += sum(
                    layer.start != BASE and server.changes()[name].matrix is not None
                    for name, layer in patch.layers.items()
                )
                client.apply(patch)
                assert client.version == version
                assert same(client, server)
                assert error(client, expected) < 1e-6
    forms = {name: change.matrix is not None for name, change in server.changes().items()}
    assert forms == {"square": True, "wide": True, "tall": True, "roomy": False}
    assert differences_beside_dense > 50
    assert {0, 49} < missed


rounds = st.lists(
    st.tuples(st.booleans(), st.fixed_dictionaries({name: st.integers(0, 8) for name in SHAPES})),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(rounds=rounds, rank_cap=st.sampled_from([0, 0, 3, 10]), seed=st.integers(0, 999), data=st.data())
def test_one_patch_leads_from_any_version_to_the_present_one(
    rounds: list[tuple[bool, dict[str, int]]], rank_cap: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    server, client = AccumulatedUpdate(rank_cap), AccumulatedUpdate()
    stop = data.draw(st.integers(0, len(rounds)))
    for version, (replaces, ranks) in enumerate(rounds, 1):
        update = {name: pair(generator, SHAPES[name], rank) for name, rank in ranks.items() if rank}
        (server.replace if replaces else server.add)(update)
        if version == stop:
            client.apply(over_the_wire(server.since(0)))
    for patch in (server.since(stop), server.since(client.held())):  # a version, or states, say what the client holds
        check_bytes(patch, server)
        fresh = AccumulatedUpdate()
        fresh._layers, fresh.version = dict(client._layers), client.version
        fresh.apply(over_the_wire(patch))
        assert same(fresh, server)
    assert not server.since(server.version).layers


def test_layers_that_a_client_did_not_hold_come_whole() -> None:
    generator, server, client = torch.Generator().manual_seed(0), AccumulatedUpdate(), AccumulatedUpdate()
    wanted = [["square"], ["square", "wide"], ["wide"], ["square", "wide"], ["square"]]
    for turn in range(20):
        server.add({name: pair(generator, SHAPES[name], 1) for name in ("square", "wide", "tall")})
        names = wanted[turn % len(wanted)]
        client.apply(server.since(client.held(), names))
        for name in names:
            assert torch.equal(client.changes()[name].dense(), server.changes()[name].dense())
    assert client.changes().keys() == {"square", "wide"}


def test_one_round_costs_the_bytes_of_its_update_and_an_unchanged_layer_none() -> None:
    generator, server = torch.Generator().manual_seed(0), AccumulatedUpdate()
    for _ in range(30):
        server.add({"square": pair(generator, (24, 24), 4), "wide": pair(generator, (8, 64), 4)})
    server.add({"square": pair(generator, (24, 24), 4)})
    patch = server.since(30)
    assert patch.layers.keys() == {"square"}
    assert patch.nbytes == 4 * 4 * (24 + 24)
    assert server.changes()["square"].matrix is not None


@pytest.mark.parametrize("held", [-1, 2, 41, 10**9, {"square": "30-0123456789abcdef"}, {"square": "x"}, {"wide": "0"}])
def test_whoever_is_not_known_gets_the_whole_change(held: int | dict[str, str]) -> None:
    generator, server = torch.Generator().manual_seed(0), AccumulatedUpdate()
    for _ in range(40):
        server.add({"square": pair(generator, (24, 24), 4)})
    layer = server.since(held).layers["square"]
    assert layer.start == BASE
    assert torch.equal(layer.updates[0].dense(), server.changes()["square"].dense())


def test_states_tell_apart_stores_whose_last_updates_are_alike() -> None:
    generator, one, other = torch.Generator().manual_seed(0), AccumulatedUpdate(), AccumulatedUpdate()
    for store in (one, other):
        store.add({"square": pair(generator, (24, 24), 1)})
    last = pair(generator, (24, 24), 1)
    for store in (one, other):
        store.add({"square": last})
    assert one.version == other.version
    assert one.held() != other.held()


def test_an_update_of_zero_is_nothing_to_send() -> None:
    accumulated = AccumulatedUpdate()
    accumulated.add({"square": (torch.ones(24, 1), torch.ones(1, 24))})
    accumulated.add({"square": (torch.zeros(24, 1), torch.ones(1, 24)), "wide": (torch.zeros(8, 2), torch.ones(2, 64))})
    assert accumulated.version == 2
    assert not accumulated.since(1).layers
    assert torch.equal(accumulated.changes()["wide"].dense(), torch.zeros(8, 64))


def test_a_server_that_went_back_to_a_checkpoint_is_told_from_the_one_before(tmp_path: Path) -> None:
    generator, lost, client = torch.Generator().manual_seed(0), AccumulatedUpdate(), AccumulatedUpdate()
    lost.add({"roomy": pair(generator, (160, 160), 2)})
    save_update(lost, tmp_path)
    lost.add({"roomy": pair(generator, (160, 160), 2)})
    client.apply(lost.since(0))  # version 2 of rounds that are forgotten
    server = load_update(tmp_path)
    for _ in range(2):
        server.add({"roomy": pair(generator, (160, 160), 2)})
    with pytest.raises(UpdateError, match=r"'roomy': the patch to version 3 continues state '2-.*holds '2-"):
        client.apply(server.since(2))
    client.apply(server.since(client.held()))
    assert same(client, server)


def test_clients_of_the_checkpoint_go_on_with_differences(tmp_path: Path) -> None:
    generator, server, client = torch.Generator().manual_seed(0), AccumulatedUpdate(), AccumulatedUpdate()
    server.add({"roomy": pair(generator, (160, 160), 20)})
    save_update(server, tmp_path)
    client.apply(server.since(0))
    server = load_update(tmp_path)
    server.add({"roomy": pair(generator, (160, 160), 2)})
    patch = server.since(client.held())
    assert patch.nbytes == 4 * 2 * (160 + 160)
    client.apply(patch)
    assert same(client, server)


def test_replace_is_the_whole_change_and_resets_other_layers() -> None:
    generator, server, client = torch.Generator().manual_seed(0), AccumulatedUpdate(), AccumulatedUpdate()
    for _ in range(5):
        server.add({name: pair(generator, shape, 3) for name, shape in SHAPES.items()})
    client.apply(server.since(0))
    update = {"square": pair(generator, (24, 24), 2), "tall": pair(generator, (64, 8), 2)}
    server.replace(update)
    assert server.version == 6
    client.apply(over_the_wire(server.since(client.held())))
    for store in (server, client):
        for name, shape in SHAPES.items():
            exact = product(update[name]) if name in update else torch.zeros(shape, dtype=torch.float64)
            torch.testing.assert_close(store.changes()[name].dense().double(), exact, rtol=1e-6, atol=1e-6)
            x = torch.randn(3, shape[1], generator=generator)
            torch.testing.assert_close(
                store.changes()[name].apply(x).double(), x.double() @ exact.T, rtol=1e-5, atol=1e-5
            )
    assert server.changes()["wide"].nbytes == 0  # back to the base, and said so
    server.add({"wide": pair(generator, (8, 64), 1)})
    client.apply(server.since(client.held()))
    assert same(client, server)


def test_rank_cap_is_the_best_approximation_and_tells_what_it_drops() -> None:
    generator, accumulated = torch.Generator().manual_seed(0), AccumulatedUpdate(rank_cap=4)
    shapes = {name: SHAPES[name] for name in ("square", "wide", "roomy")}
    exact = {name: np.zeros(shape) for name, shape in shapes.items()}
    cut = total = 0.0
    for turn in range(6):
        update = {name: pair(generator, shape, 3) for name, shape in shapes.items()}
        shares, round_cut, round_total = accumulated.add(update), 0.0, 0.0
        for name in shapes:
            u, sigma, vh = np.linalg.svd(exact[name] + product(update[name]).numpy(), full_matrices=False)
            exact[name] = (u[:, :4] * sigma[:4]) @ vh[:4]
            round_cut, round_total = round_cut + np.sum(sigma[4:] ** 2), round_total + np.sum(sigma**2)
            assert shares[name] == pytest.approx(np.sum(sigma[4:] ** 2) / np.sum(sigma**2), rel=1e-4, abs=1e-12)
            got = accumulated.changes()[name].dense().double().numpy()
            assert np.linalg.norm(got - exact[name]) < 1e-5 * np.linalg.norm(exact[name])
            assert np.linalg.matrix_rank(got, tol=1e-4) == min(4, 3 * (turn + 1))
        cut, total = cut + round_cut, total + round_total
        assert accumulated.dropped == pytest.approx(round_cut / round_total, rel=1e-4, abs=1e-12)
        assert accumulated.dropped_total == pytest.approx(cut / total, rel=1e-4, abs=1e-12)
    assert accumulated.dropped > 0.1


def test_without_a_rank_cap_nothing_is_dropped() -> None:
    accumulated = AccumulatedUpdate()
    assert accumulated.add({"w": pair(torch.Generator().manual_seed(0), (9, 9), 9)}) == {}
    assert accumulated.dropped == accumulated.dropped_total == 0


def test_a_frozen_factor_keeps_the_change_thin() -> None:
    """Updates that share ``A`` sum to one of its rank, however many rounds and clients there are."""
    generator, accumulated = torch.Generator().manual_seed(0), AccumulatedUpdate()
    a = torch.randn(4, 160, generator=generator)
    exact = torch.zeros(160, 160, dtype=torch.float64)
    for _ in range(20):
        update = torch.randn(160, 40, generator=generator), a.repeat(10, 1)  # ten clients
        exact += product(update)
        accumulated.add({"roomy": update})
        ranks = accumulated.changes()["roomy"].nbytes // (4 * (160 + 160))
        assert ranks == (40 if accumulated.version == 1 else 4)  # the first update is taken as it is
    assert error(accumulated, {"roomy": exact}) < 1e-6
    assert (
        accumulated.since(15).nbytes == accumulated.changes()["roomy"].nbytes
    )  # not the five updates that are missing


def test_a_thinner_pair_is_looked_for_when_the_rank_passes_a_power_of_two() -> None:
    generator, accumulated, client = torch.Generator().manual_seed(0), AccumulatedUpdate(), AccumulatedUpdate()
    b, a = pair(generator, (160, 160), 5)
    ranks = []
    for _ in range(6):
        accumulated.add({"roomy": (b, a)})  # five ranks in truth, whatever the sum
        ranks.append(accumulated.changes()["roomy"].nbytes // (4 * (160 + 160)))
        if accumulated.version in (2, 5):
            client.apply(accumulated.since(client.held()))
            assert same(client, accumulated)
    assert ranks == [5, 5, 5, 5, 5, 5]
    fresh = AccumulatedUpdate()
    for _ in range(3):
        fresh.add({"roomy": pair(generator, (160, 160), 3)})
    assert fresh.changes()["roomy"].nbytes == 4 * 9 * (160 + 160)


def test_an_update_in_another_dtype_is_taken_as_fp32() -> None:
    accumulated = AccumulatedUpdate()
    accumulated.add({"w": (torch.ones(3, 1, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bfloat16))})
    assert all(tensor.dtype == torch.float32 for tensor in accumulated.changes()["w"].tensors)
    assert torch.equal(accumulated.changes()["w"].dense(), torch.ones(3, 3))


@pytest.mark.parametrize(
    ("update", "says"),
    [
        ((torch.ones(24, 2), torch.ones(3, 24)), r"B \(24, 2\) and A \(3, 24\) do not share a rank"),
        ((torch.ones(24), torch.ones(1, 24)), r"B \(24,\) and A \(1, 24\)"),
        ((torch.ones(8, 1), torch.ones(1, 24)), r"is \(24, 24\), and its update is \(8, 24\)"),
        ((torch.full((24, 1), math.nan), torch.ones(1, 24)), "not finite; lower train.lr"),
        ((torch.ones(24, 1), torch.full((1, 24), math.inf)), "not finite; lower train.lr"),
    ],
)
def test_refuses_what_cannot_be_added_and_stays_as_it_was(update: Factors, says: str) -> None:
    accumulated, good = AccumulatedUpdate(), (torch.ones(24, 1), torch.ones(1, 24))
    accumulated.add({"square": good})
    for method in (accumulated.add, accumulated.replace):
        with pytest.raises(UpdateError, match=says):
            method({"other": good, "square": update})
    assert accumulated.version == 1
    assert accumulated.changes().keys() == {"square"}
    assert torch.equal(accumulated.changes()["square"].dense(), torch.ones(24, 24))


def test_refuses_a_negative_rank_cap() -> None:
    with pytest.raises(UpdateError, match="rank_cap=-1 is negative"):
        AccumulatedUpdate(rank_cap=-1)


def test_refuses_tensors_and_text_of_two_patches() -> None:
    generator, one, other = torch.Generator().manual_seed(0), AccumulatedUpdate(), AccumulatedUpdate()
    one.add({"square": pair(generator, (24, 24), 1)})
    other.add({"wide": pair(generator, (8, 64), 1)})
    with pytest.raises(UpdateError, match="not those of one patch"):
        Patch.unpack(one.since(0).pack()[0], other.since(0).pack()[1])


def test_thin_finds_the_numerical_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(30, 3, generator=generator), torch.randn(3, 20, generator=generator)
    fat_b, fat_a = torch.cat([b, b, -b], dim=1), torch.cat([a, 2 * a, a], dim=0)  # rank 9 on paper, 3 in truth
    thin_b, thin_a = recompress(fat_b, fat_a)
    assert thin_b.shape == (30, 3)
    assert thin_a.shape == (3, 20)
    torch.testing.assert_close(thin_b @ thin_a, 2 * b @ a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("small", "rank"), [(2e-7, 3), (1e-8, 2)])
def test_thin_drops_what_is_below_the_rounding_of_fp32_and_no_more(small: float, rank: int) -> None:
    b, a = torch.eye(9)[:, :3] * torch.tensor([1.0, 0.5, small]), torch.eye(7)[:3]
    assert recompress(b, a)[0].shape == (9, rank)


def test_thin_of_zero_is_empty_and_of_full_rank_is_untouched() -> None:
    assert recompress(torch.zeros(5, 2), torch.ones(2, 4))[0].shape == (5, 0)
    b, a = torch.eye(5)[:, :2], torch.eye(4)[:2]
    assert recompress(b, a)[0] is b


def test_pack_and_unpack_are_inverse() -> None:
    accumulated = AccumulatedUpdate()
    generator = torch.Generator().manual_seed(0)
    accumulated.add({"thin": pair(generator, (30, 30), 1), "dense": pair(generator, (3, 3), 3)})
    packed = pack(accumulated.changes())
    assert sorted(packed) == ["dense:dense", "thin:A", "thin:B"]
    for name, change in unpack(packed):
        assert torch.equal(change.dense(), accumulated.changes()[name].dense())


def test_below_selects_layers() -> None:
    accumulated = AccumulatedUpdate()
    accumulated.add({"a": (torch.ones(3, 1), torch.ones(1, 3)), "b": (torch.ones(3, 1), torch.ones(1, 3))})
    assert accumulated.below({"b", "c"}).keys() == {"b"}
