"""Many clients' adapters become one update of the model.

An adapter changes a layer by the product ``B A``, so what a round ought to give is the weighted sum of the products,

    dW = sum_i p_i B_i A_i = [B_1 ... B_n] [p_1 A_1 ; ... ; p_n A_n]

with the LoRA scale already in ``A_i``. Noise-free adapter aggregation (HSplitLoRA, section NAA) concatenates along the
rank, as on the right: exact for any mix of ranks. The mean of the ``B`` times the mean of the ``A`` is something else,
``sum_ij p_i p_j B_i A_j``: it pairs one client's ``B`` with another client's ``A``. That is noise.

====================  ============================================  ===============  ==========================
rule                  what it does                                  sum of products  ranks
====================  ============================================  ===============  ==========================
``noise_free``        concatenation (HSplitLoRA, FLoRA)             kept             any; their sum comes out
``svd``               the same by singular values (FlexLoRA)        kept             any; the fewest come out
``mean_b``            ``A`` shared and frozen, mean of ``B``        kept             one for all
                      (FFA-LoRA)
``mean``              mean of ``A``, mean of ``B`` (FedIT,          noise            one for all
                      SplitLoRA)
``zero_pad``          ``mean``, after padding to the largest rank   noise            any; the largest comes out
                      with zeros, so ranks that few hold fade
``zero_pad_by_norm``  ``zero_pad``, weights by the norm of ``B A``  noise            any; the largest comes out
                      in place of ``p_i`` (HetLoRA)
====================  ============================================  ===============  ==========================

A client without an adapter on a layer has rank 0 there, whatever the rule. An adapter that several clients trained in
turn, as on a server that they share, counts as one client's, with the weights of all of them:

    dW = (sum over those of p_i) B A  +  sum over the others of p_i B_i A_i
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

from hsplitlora_flwr.registry import Registry

Factors = tuple[Tensor, Tensor]
"""``(B, A)`` of one layer: ``(out, r)`` and ``(r, in)``."""
Update = Mapping[str, Factors]
"""One client's adapters by absolute layer name, scales folded into ``A``."""
Rule = Callable[[Sequence[Factors], Sequence[float]], Factors]
"""Joins one layer's ``(B, A)`` of all clients, given their ``p_i``: of one dtype, rank 0 where one has none."""


_OURS = "noise_free", "mean", "mean_b", "zero_pad", "zero_pad_by_norm", "svd"
RULES: Registry[Rule] = Registry("aggregation rule", *_OURS)
"""Aggregation rules by name."""


def register_rule(name: str) -> Callable[[Rule], Rule]:
    """Make a function known as an aggregation rule, which a :class:`~hsplitlora_flwr.methods.Method` may name::

        @register_rule("first")
        def first(pairs, shares):
            return pairs[0]

    It is called for every layer by itself. What it is given has been checked: shapes that agree, finite numbers, one
    dtype; shares are not negative and add up to 1. What it returns is taken over in that dtype.

    Raises
    ------
    PluginError
        If the name is taken.
    """
    return lambda rule: RULES.register(name, rule)


class AggregationError(ValueError):
    """Updates that cannot be summed; the text names the layer and the ranks or shapes."""


@dataclass(frozen=True)
class SharedUpdate:
    """Adapters that several clients trained in turn.

    Parameters
    ----------
    adapters : Mapping[str, tuple[Tensor, Tensor]]
        By absolute layer name, as an update.
    trained_by : Mapping[str, Collection[int]]
        By the same names: the clients that trained it, as indices into the updates of the round; the others may hold
        adapters of their own on that layer. What no client of the round trained counts for nothing.
    """

    adapters: Update
    trained_by: Mapping[str, Collection[int]]


def aggregate(
    updates: Sequence[Update],
    weights: Sequence[float],
    rule: str = "noise_free",
    shared: SharedUpdate | None = None,
) -> dict[str, Factors]:
    """Join the updates of a round.

    Parameters
    ----------
    updates : Sequence[Mapping[str, tuple[Tensor, Tensor]]]
        One per client: absolute layer name -> ``(B, A)`` of shapes ``(out, r)`` and ``(r, in)``, the scale folded in.
        Ranks may differ between clients and layers, and so may the layers that clients hold, as far as the rule allows.
    weights : Sequence[float]
        One per client, for instance the clients' numbers of examples; normalised to sum 1 they are the ``p_i``.
    rule : str
        A name in :data:`RULES`.
    shared : SharedUpdate, optional
        What clients trained together. No client that did holds an adapter of its own there.

    Returns
    -------
    dict[str, tuple[Tensor, Tensor]]
        ``(B, A)`` by layer name, tensors of their own, computed in fp64 and rounded once to the clients' dtype, fp32 at
        least. Under ``noise_free``, ``svd`` and ``mean_b`` their product is the weighted sum of the clients' products.

    Raises
    ------
    AggregationError
        If there is nothing to sum, a weight is negative or not finite, an adapter is not finite, shapes of one layer
        disagree, a client counts twice on a layer, or the rule cannot join what the clients hold.
    """
    if rule not in RULES:
        raise AggregationError(f"rule '{rule}' is unknown; choose one of {', '.join(RULES)}")
    if not updates or len(updates) != len(weights):
        raise AggregationError(f"{len(updates)} updates and {len(weights)} weights; one weight per update is needed")
    total = sum(weights)
    if any(weight < 0 for weight in weights) or not 0 < total < float("inf"):
        raise AggregationError(f"weights {list(weights)} must be finite, not negative, and not all zero")
    shares = [weight / total for weight in weights]
    together = {name: pair for name, pair in shared.adapters.items() if shared.trained_by[name]} if shared else {}
    result: dict[str, Factors] = {}
    for name in dict.fromkeys(chain.from_iterable([*updates, together])):
        held, counts = [update.get(name) for update in updates], list(shares)
        try:
            if shared and name in together:
                held, counts = _with_shared(held, counts, together[name], shared.trained_by[name])
            _check(held)
            pairs = _align(held)
            b, a = RULES[rule](pairs, counts)
            _check_joined(rule, b, a, pairs[0])
        except AggregationError as error:
            raise AggregationError(f"layer '{name}': {error}") from None
        dtype = pairs[0][0].dtype
        result[name] = b.to(dtype), a.to(dtype)
    return result


def residual(updates: Sequence[Update], weights: Sequence[float], adapter: Update) -> dict[str, Factors]:
    """What the exact sum of the clients has and an adapter in its place lacks: ``sum_i p_i B_i A_i - B A``.

    Source: FedEx-LoRA, arXiv 2410.09432.

    Parameters
    ----------
    updates, weights
        As for :func:`aggregate`.
    adapter : Mapping[str, tuple[Tensor, Tensor]]
        ``(B, A)`` of the same layers, which goes on in the place of the sum.

    Returns
    -------
    dict[str, tuple[Tensor, Tensor]]
        ``(B, A)`` by layer name.
    """
    exact = aggregate(updates, weights)
    return {
        name: (torch.cat([exact[name][0], b], dim=1), torch.cat([exact[name][1], -a]))
        for name, (b, a) in adapter.items()
    }


def directions(factors: Factors, rank: int) -> Factors:
    """The directions of a layer's input along which an update changes its output most, as an adapter that adds nothing.

    By subspace iteration from random rows (Halko, Martinsson and Tropp, arXiv 0909.4061): the sum of a hundred clients
    has a rank of thousands, of which these are a few.

    Parameters
    ----------
    factors : tuple[Tensor, Tensor]
        ``(B, A)``: ``(out, r)`` and ``(r, in)``.
    rank : int
        How many, at most.

    Returns
    -------
    tuple[Tensor, Tensor]
        A ``B`` without columns, ``(out, 0)``, and the right singular vectors of ``B A`` by falling singular value, as
        orthonormal rows ``(min(rank, rank of B A), in)`` in the dtype of ``A``: to rounding where ``B A`` has a rank of
        at most ``rank + 8``, else those of the largest part of it.
    """
    b, a = factors
    rows = min(rank + _SPARE, len(a), len(b), a.shape[1])
    random = torch.randn(b.shape[0], rows, generator=torch.Generator().manual_seed(0), dtype=b.dtype).to(b.device)
    right = torch.linalg.qr(a.T @ (b.T @ random)).Q  # (in, rows)
    for _ in range(_ITERATIONS):
        left = torch.linalg.qr(b @ (a @ right)).Q
        right = torch.linalg.qr(a.T @ (b.T @ left)).Q
    _, sigma, vh = torch.linalg.svd(b @ (a @ right), full_matrices=False)
    found = int((sigma > _RELATIVE_NOTHING * sigma.max()).sum()) if rows else 0
    return truncate((b[:, :0], vh[:found] @ right.T), rank)


_SPARE, _ITERATIONS = 8, 3
"""Rows beyond those that are asked for, and passes over the update, each of which sets them further apart."""
_RELATIVE_NOTHING = 1e-5
"""Singular values below this share of the largest are rounding: some ten times the resolution of fp32."""


def truncate(factors: Factors, rank: int) -> Factors:
    """The first ``rank`` ranks of an adapter: what HetLoRA sends to a client, and, after ``svd``, FlexLoRA.

    Parameters
    ----------
    factors : tuple[Tensor, Tensor]
        ``(B, A)``. Under the rule ``svd`` ranks stand by falling singular value, and the result is the best
        approximation of that rank (Eckart-Young).
    rank : int
        How many to keep, from 0 up; where there are fewer, all are kept and none is added (:func:`pad` adds).

    Returns
    -------
    tuple[Tensor, Tensor]
        Contiguous copies ``(out, r)`` and ``(r, in)`` with ``r = min(rank, the rank there is)``.

    Raises
    ------
    AggregationError
        If ``rank`` is negative.
    """
    if rank < 0:
        raise AggregationError(f"rank {rank} is negative; keep 0 ranks or more")
    b, a = factors
    # copies: a view would drag the whole storage into every message
    dense = torch.contiguous_format
    return b[:, :rank].clone(memory_format=dense), a[:rank].clone(memory_format=dense)


def pad(factors: Factors, rank: int) -> Factors:
    """The same product ``B A`` at a higher rank: columns of ``B`` and rows of ``A`` that are zero, behind the others.

    Parameters
    ----------
    factors : tuple[Tensor, Tensor]
        ``(B, A)``.
    rank : int
        The rank of the result.

    Raises
    ------
    AggregationError
        If ``rank`` is below the rank there is.
    """
    b, a = factors
    missing = rank - b.shape[1]
    if missing < 0:
        raise AggregationError(f"rank {b.shape[1]} cannot be padded to rank {rank}; truncate it instead")
    return functional.pad(b, (0, missing)), functional.pad(a, (0, 0, 0, missing))


@register_rule("noise_free")
def _noise_free(pairs: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """Concatenation along the rank (docs/method.md, section 4; FLoRA, arXiv 2409.05976); ``p_i`` goes into ``A``."""
    left = torch.cat([b for b, _ in pairs], dim=1)  # (out, R)
    weighted = ((share * a.double()).to(a.dtype) for share, (_, a) in zip(shares, pairs, strict=True))
    return left, torch.cat(list(weighted))  # (R, in)


@register_rule("svd")
def _svd(pairs: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """``(U sqrt(S), sqrt(S) V^T)`` of the weighted sum ``U S V^T`` of the products (FlexLoRA, arXiv 2402.11505).

    Singular values fall. Those that rounding cannot tell from zero are dropped, but rank 1 stays where a client has it.
    """
    b, a = _noise_free(_double(pairs), shares)
    # The dense sum (out, in) is never formed: its singular values are those of the core between two thin QRs.
    q_left, r_left = torch.linalg.qr(b)
    q_right, r_right = torch.linalg.qr(a.T)
    u, sigma, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    rank = max(1, int((sigma > _RELATIVE_ZERO * sigma.max()).sum())) if sigma.numel() else 0
    root = sigma[:rank].sqrt()
    return q_left @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ q_right.T


_RELATIVE_ZERO = 1e-12
"""Singular values below this share of the largest are rounding: some thousand times the resolution of fp64."""


@register_rule("mean")
def _mean(pairs: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """Mean of ``B`` and mean of ``A`` (FedIT, arXiv 2305.05644; SplitLoRA, arXiv 2407.00952)."""
    _check_one_rank(pairs)
    return _weighted(pairs, shares)


@register_rule("mean_b")
def _mean_b(pairs: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """The ``A`` that all share, and the mean of ``B`` (FFA-LoRA, arXiv 2403.12313)."""
    _check_one_rank(pairs)
    shared = pairs[0][1]
    for index, (_, a) in enumerate(pairs):
        if not torch.equal(a, shared):
            raise AggregationError(
                f"A of updates[{index}] differs from that of updates[0] by up to {(a - shared).abs().max():.3g}; "
                "this rule needs one frozen A: start every client from the same A and train B alone"
            )
    return _weighted(pairs, shares)[0], shared.clone()


@register_rule("zero_pad")
def _zero_pad(pairs: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """The means of the factors, each padded with zeros to the largest rank."""
    largest = max(b.shape[1] for b, _ in pairs)
    return _weighted([pad(pair, largest) for pair in pairs], shares)


@register_rule("zero_pad_by_norm")
def _zero_pad_by_norm(pairs: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """``zero_pad`` with weights in proportion to the Frobenius norm of ``B_i A_i`` (HetLoRA, arXiv 2401.06432).

    Where every norm is zero the weights stay ``p_i``.
    """
    norms = [_norm(b, a) for b, a in _double(pairs)]
    total = sum(norms)
    return _zero_pad(pairs, [norm / total for norm in norms] if total else shares)


def _weighted(pairs: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """Weighted means of the ``B`` and of the ``A``, fp64; all ranks are equal here."""
    b, a = (torch.zeros(part.shape, dtype=torch.float64, device=part.device) for part in pairs[0])
    for share, (one_b, one_a) in zip(shares, _double(pairs), strict=True):
        b.add_(one_b, alpha=share)
        a.add_(one_a, alpha=share)
    return b, a


def _norm(b: Tensor, a: Tensor) -> float:
    """The Frobenius norm of ``B A`` from two thin QRs, without the dense product."""
    core = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T
    return float(torch.linalg.norm(core))


def _with_shared(
    held: Sequence[Factors | None], shares: Sequence[float], pair: Factors, trained_by: Collection[int]
) -> tuple[list[Factors | None], list[float]]:
    """The clients that did not train the shared adapter, and it in the place of those that did."""
    if twice := [index for index in trained_by if held[index] is not None]:
        raise AggregationError(f"updates{twice} hold an adapter of their own beside the shared one that they trained")
    others = [index for index in range(len(held)) if index not in trained_by]
    together = sum(shares[index] for index in trained_by)
    return [*(held[index] for index in others), pair], [*(shares[index] for index in others), together]


def _align(held: Sequence[Factors | None]) -> list[Factors]:
    """One pair per client, all of the clients' common dtype; of rank 0 where a client holds no adapter on the layer."""
    dtype = reduce(torch.promote_types, (part.dtype for pair in held if pair for part in pair), torch.float32)
    b, a = next(pair for pair in held if pair)
    none = b[:, :0], a[:0]
    return [(b.detach().to(dtype), a.detach().to(dtype)) for b, a in (pair or none for pair in held)]


def _double(pairs: Iterable[Factors]) -> list[Factors]:
    return [(b.double(), a.double()) for b, a in pairs]


def is_finite(tensor: Tensor) -> bool:
    """Whether every entry is finite; one pass, no memory."""
    return not tensor.numel() or all(extreme.isfinite() for extreme in tensor.aminmax())


def _check(held: Sequence[Factors | None]) -> None:
    outer = set()
    for index, pair in enumerate(held):
        if pair is None:
            continue
        b, a = pair
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
            raise AggregationError(
                f"B {tuple(b.shape)} and A {tuple(a.shape)} of updates[{index}] do not share a rank; "
                "(out, r) and (r, in) are needed"
            )
        if not (is_finite(b) and is_finite(a)):
            raise AggregationError(
                f"the adapter of updates[{index}] is not finite: that client's training diverged; "
                "leave the client out, or lower the learning rate"
            )
        outer.add((b.shape[0], a.shape[1]))
    if len(outer) > 1:
        raise AggregationError(f"(out, in) differs between clients: {sorted(outer)}; the clients' models differ")


def _check_joined(rule: str, b: Tensor, a: Tensor, like: Factors) -> None:
    """What a rule made is an adapter of the layer, whoever wrote the rule."""
    wanted = len(like[0]), like[1].shape[1]
    if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] or (len(b), a.shape[1]) != wanted:
        raise AggregationError(
            f"rule '{rule}' made B {tuple(b.shape)} and A {tuple(a.shape)} of a layer of (out, in) = {wanted}; "
            "(out, r) and (r, in) are needed"
        )
    if not (is_finite(b) and is_finite(a)):
        raise AggregationError(f"rule '{rule}' made numbers that are not finite")


def _check_one_rank(pairs: Sequence[Factors]) -> None:
    # A factor of rank 1 would broadcast over the others without a word.
    ranks = [b.shape[1] for b, _ in pairs]
    if len(set(ranks)) > 1:
        raise AggregationError(
            f"the clients' ranks are {ranks} (0 = no adapter), and this rule needs one rank; "
            "give every client the same rank and layers, or use noise_free, svd or zero_pad"
        )
