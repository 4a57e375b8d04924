"""The accumulated update stays exact and bounded over many rounds."""

from __future__ import annotations

import torch

from hsplitlora_flwr.lora.delta import Delta, pack, thin, unpack


def test_fifty_rounds_stay_exact_and_never_exceed_the_dense_size() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (24, 16), "k": (8, 16), "up": (40, 16)}
    expected = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    delta = Delta()
    for turn in range(50):
        update = {}
        for name, (rows, columns) in shapes.items():
            rank = int(torch.randint(0, 4, (1,), generator=generator))
            if rank:
                b = 0.1 * torch.randn(rows, rank, generator=generator)
                update[name] = b, torch.randn(rank, columns, generator=generator)
                expected[name] += update[name][0].double() @ update[name][1].double()
        delta.add(update)
        assert delta.version == turn + 1
        for name, change in delta.changes().items():
            error = torch.linalg.norm(change.dense().double() - expected[name]) / torch.linalg.norm(expected[name])
            assert error < 1e-6
            assert change.nbytes <= 4 * shapes[name][0] * shapes[name][1]


def test_thin_finds_the_numerical_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(30, 3, generator=generator), torch.randn(3, 20, generator=generator)
    fat_b, fat_a = torch.cat([b, b, -b], dim=1), torch.cat([a, 2 * a, a], dim=0)  # rank 9 on paper, 3 in truth
    thin_b, thin_a = thin(fat_b, fat_a)
    assert thin_b.shape == (30, 3)
    assert thin_a.shape == (3, 20)
    torch.testing.assert_close(thin_b @ thin_a, 2 * b @ a, rtol=1e-5, atol=1e-5)


def test_thin_of_zero_is_empty_and_of_full_rank_is_untouched() -> None:
    assert thin(torch.zeros(5, 2), torch.ones(2, 4))[0].shape == (5, 0)
    b, a = torch.eye(5)[:, :2], torch.eye(4)[:2]
    assert thin(b, a)[0] is b


def test_pack_and_unpack_are_inverse() -> None:
    delta = Delta()
    generator = torch.Generator().manual_seed(0)
    delta.add({"thin": (torch.randn(30, 1, generator=generator), torch.randn(1, 30, generator=generator))})
    delta.add({"dense": (torch.randn(3, 3, generator=generator), torch.randn(3, 3, generator=generator))})
    packed = pack(delta.changes())
    assert sorted(packed) == ["dense:dense", "thin:A", "thin:B"]
    for name, change in unpack(packed):
        assert torch.equal(change.dense(), delta.changes()[name].dense())


def test_below_selects_layers() -> None:
    delta = Delta()
    delta.add({"a": (torch.ones(3, 1), torch.ones(1, 3)), "b": (torch.ones(3, 1), torch.ones(1, 3))})
    assert delta.below({"b", "c"}).keys() == {"b"}
