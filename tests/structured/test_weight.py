"""The structured form computes what torch's computes, with the same gradients, and never a matrix of n x n."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import orthoserde
from orthoserde import _torch
from orthoserde.orthonormal.completion import complete
from orthoserde.orthonormal.thin_maps import THIN_MAPS
from orthoserde.parametrizations.structured import Orthogonal
from tests.helpers import same_bits
from tests.structured.models import (
    CASES,
    COLUMNS,
    MAPS,
    ORIGINAL,
    REAL,
    Holder,
    link,
    make,
    move,
    orthonormal,
    weight_of,
)


def tolerance(dtype: torch.dtype, scale: float = 50.0) -> float:
    return scale * torch.finfo(dtype).eps


def residual(weight: Tensor) -> float:
    wide = weight.detach().to(torch.complex128 if weight.is_complex() else torch.float64)
    tall = wide.mT if wide.size(-2) < wide.size(-1) else wide
    error = (tall.mH @ tall - torch.eye(tall.size(-1))).abs()
    return float(error.max()) if error.numel() else 0.0


@pytest.mark.parametrize(("orthogonal_map", "shape", "dtype"), CASES)
@pytest.mark.parametrize("moved", [0.0, 0.3, 3.0])
def test_the_weight_is_torchs_but_for_rounding(
    orthogonal_map: str, shape: tuple[int, ...], dtype: torch.dtype, moved: float
) -> None:
    ours = make(shape, orthogonal_map, dtype, moved=moved)
    theirs = make(shape, orthogonal_map, dtype, moved=moved, structured=False)
    assert torch.equal(ours.get_parameter(ORIGINAL), theirs.get_parameter(ORIGINAL))
    bound = tolerance(dtype, 100)
    # Torch's matrix_exp is off by up to 2e-10 in double precision; what is right is tested below.
    theirs_off = 1e-9 if orthogonal_map == "matrix_exp" else 0.0
    torch.testing.assert_close(weight_of(ours), weight_of(theirs), rtol=0, atol=bound + theirs_off)
    assert residual(weight_of(ours)) <= bound


@pytest.mark.parametrize(("orthogonal_map", "shape", "dtype"), CASES)
def test_an_orthonormal_weight_is_kept_bit_for_bit(
    orthogonal_map: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = orthonormal(shape, dtype)
    module = make(shape, orthogonal_map, dtype, moved=0)
    assert torch.equal(weight_of(module), weight)
    assert module.get_buffer(COLUMNS).is_contiguous()


def test_any_other_weight_is_replaced_by_its_q_factor_as_torch_does() -> None:
    weight = torch.randn(12, 4)
    ours = weight_of(orthoserde.orthogonal(Holder(weight.clone()), structured=True))
    theirs = weight_of(orthoserde.orthogonal(Holder(weight.clone())))
    assert same_bits(ours, theirs)


def flow(module: nn.Module, probe: Tensor) -> Tensor:
    """Gradient of a function of the weight."""
    (weight_of(module) * probe).abs().square().sum().backward()  # type: ignore[no-untyped-call]
    gradient = module.get_parameter(ORIGINAL).grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize(("orthogonal_map", "shape", "dtype"), CASES)
@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_the_gradient_is_torchs_but_for_rounding(
    orthogonal_map: str, shape: tuple[int, ...], dtype: torch.dtype, moved: float
) -> None:
    probe = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(5))
    ours = flow(make(shape, orthogonal_map, dtype, moved=moved), probe)
    if ours.numel() == 0:
        return  # torch's householder has no gradient for an empty batch
    theirs = flow(make(shape, orthogonal_map, dtype, moved=moved, structured=False), probe)
    scale = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=scale * tolerance(dtype, 400))


@pytest.mark.parametrize("shape", [(12, 4), (4, 12), (5, 4), (6, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_what_has_no_say_gets_a_gradient_of_exactly_zero(
    orthogonal_map: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """With rounding there, Adam would walk along coordinates that do not matter, or off the signs of householder."""
    if orthogonal_map == "householder" and dtype.is_complex:
        return
    gradient = flow(make(shape, orthogonal_map, dtype, moved=0.3), torch.randn(shape, dtype=dtype))
    tall = gradient.mT if shape[-2] < shape[-1] else gradient
    assert (tall.triu(1) == 0).all()
    diagonal = tall.diagonal(dim1=-2, dim2=-1)
    assert not (diagonal.real if dtype.is_complex else diagonal).any()


@pytest.mark.parametrize("shape", [(7, 2), (2, 7), (2, 5, 2), (4, 3), (3, 3)], ids=str)
@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("moved", [0.0, 0.4])
def test_gradients_and_second_derivatives_are_right(orthogonal_map: str, shape: tuple[int, ...], moved: float) -> None:
    module = make(shape, orthogonal_map, torch.float64, moved=moved)
    original = module.get_parameter(ORIGINAL).detach().requires_grad_()
    mask, signs = torch.ones_like(original), torch.zeros_like(original)
    mask.diagonal(dim1=-2, dim2=-1).zero_()
    signs.diagonal(dim1=-2, dim2=-1).fill_(-1.0)

    def weight(original: Tensor) -> Tensor:
        """Without the diagonal, whose signs a small step makes zero."""
        result: Tensor = link(module)(original * mask + signs)
        return result

    assert torch.autograd.gradcheck(weight, (original,))
    assert torch.autograd.gradgradcheck(weight, (original,))


@pytest.mark.parametrize("orthogonal_map", ["cayley", "matrix_exp"])
def test_complex_gradients_are_right(orthogonal_map: str) -> None:
    module = make((7, 2), orthogonal_map, torch.complex128)
    original = module.get_parameter(ORIGINAL).detach().requires_grad_()
    assert torch.autograd.gradcheck(link(module), (original,))


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_stays_on_the_constraint_and_with_torch(
    orthogonal_map: str, optimizer: type[torch.optim.Optimizer]
) -> None:
    def trained(structured: bool) -> Tensor:
        module = make((24, 4), orthogonal_map, torch.float64, structured=structured)
        steps = optimizer(module.parameters(), lr=1e-2)  # type: ignore[call-arg]
        target = orthonormal((24, 4), torch.float64, seed=9)
        for _ in range(50):
            steps.zero_grad()
            (weight_of(module) - target).square().sum().backward()  # type: ignore[no-untyped-call]
            steps.step()
        return weight_of(module).detach()

    ours, theirs = trained(True), trained(False)
    assert residual(ours) < 1e-13
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_no_matrix_of_n_x_n_is_ever_made(orthogonal_map: str) -> None:
    n, k = 512, 4
    weight = orthonormal((n, k))
    with _torch.LargestTensor() as largest:
        module = orthoserde.orthogonal(Holder(weight), orthogonal_map=orthogonal_map, structured=True)
        flow(module, torch.ones(n, k))
        copy.deepcopy(module)
    assert largest.nbytes <= 2 * n * k * 8  # two columns for each of the weight's, in double precision


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_under_autocast_the_weight_stays_orthonormal(orthogonal_map: str) -> None:
    module = make((24, 4), orthogonal_map)
    plain = weight_of(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = weight_of(module)
        used = nn.functional.linear(torch.ones(2, 4), weight)
    assert same_bits(weight, plain)
    assert used.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(24, 4), (4, 24)], ids=str)
@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_torch_compile_computes_the_same(orthogonal_map: str, shape: tuple[int, ...]) -> None:
    module = orthoserde.orthogonal(
        nn.Linear(shape[1], shape[0], bias=False), orthogonal_map=orthogonal_map, structured=True
    )
    move(module, 0.3)
    plain = flow(module, torch.ones(shape)).clone()
    module.zero_grad()
    torch.compiler.reset()
    # aot_eager traces forward and backward and decomposes both, and needs no C++ compiler.
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    weight = compiled(torch.eye(shape[1])).mT
    torch.testing.assert_close(weight, weight_of(module), rtol=0, atol=tolerance(torch.float32))
    weight.square().sum().backward()
    gradient = module.get_parameter(ORIGINAL).grad
    assert gradient is not None
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch 2.3 has no batching rule for matrix_exp
@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_vmap_and_functional_calls_work(orthogonal_map: str) -> None:
    module = make((12, 4), orthogonal_map)
    original = module.get_parameter(ORIGINAL).detach()
    stacked = torch.stack([original, original * 0.5 - 0.5 * torch.eye(12, 4)])
    if orthogonal_map == "householder":  # a sign that is no whole number is none
        stacked = torch.stack([original, original.tril(-1) * 0.5 - torch.eye(12, 4)])
    mapped = torch.func.vmap(link(module))(stacked)
    for one, each in zip(mapped, stacked, strict=True):
        torch.testing.assert_close(one, link(module)(each), rtol=0, atol=tolerance(torch.float32))
    called = torch.func.functional_call(link(module), {}, (original,))
    assert same_bits(called, weight_of(module))


# Life of the module


def test_copies_and_pickles_are_whole() -> None:
    module = make((12, 4))
    for other in (copy.deepcopy(link(module)), pickle.loads(pickle.dumps(link(module)))):
        assert same_bits(other(module.get_parameter(ORIGINAL)), weight_of(module))
        fresh = make((12, 4), moved=0, seed=3)
        assert not torch.equal(link(fresh).get_buffer("factor"), other.get_buffer("factor"))
        other.load_state_dict({"columns": orthonormal((12, 4), seed=3)})
        # The hook that works them out has come along.
        assert torch.equal(other.get_buffer("factor"), link(fresh).get_buffer("factor"))


def test_a_cast_to_double_goes_along() -> None:
    module = make((12, 4)).double()
    twin = make((12, 4), structured=False).double()
    torch.testing.assert_close(weight_of(module), weight_of(twin), rtol=0, atol=1e-6)
    assert weight_of(module).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_with_what_to_do(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=r"float32 or better, got torch\.b?float16; .*autocast"):
        _ = make((12, 4)).to(dtype).weight


def test_one_dtype_for_original_and_columns() -> None:
    module = make((12, 4))
    with pytest.raises(RuntimeError, match=r"expected torch\.float32 .* got torch\.float64"):
        link(module)(module.get_parameter(ORIGINAL).double())


def test_without_columns_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="without columns; load its state first"):
        Orthogonal((4, 2), "cayley")(torch.zeros(4, 2))


@pytest.mark.parametrize(("shape", "name", "message"), [((4,), "cayley", "batch of matrices"), ((4, 2), "qr", "'qr'")])
def test_what_cannot_be_constructed(shape: tuple[int, ...], name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Orthogonal(shape, name)


def test_without_trivialization_there_is_nothing_to_structure() -> None:
    module = Holder(torch.randn(4, 2))
    with pytest.raises(ValueError, match="use_trivialization=False"):
        orthoserde.orthogonal(module, use_trivialization=False, structured=True)
    assert type(module) is Holder


@pytest.mark.parametrize("shape", [(12, 4), (4, 12)], ids=str)
def test_a_weight_that_is_assigned_starts_a_new_chart(shape: tuple[int, ...]) -> None:
    module = make(shape)
    weight = orthonormal(shape, seed=7)
    parameter = module.get_parameter(ORIGINAL)
    module.weight = weight
    assert torch.equal(weight_of(module), weight)
    assert module.get_parameter(ORIGINAL) is parameter
    move(module, 0.3)
    other = make(shape, moved=0, seed=7)
    move(other, 0.3)
    assert same_bits(weight_of(module), weight_of(other))
    with pytest.raises(ValueError, match="weight: expected"):
        link(module).right_inverse(weight[1:])


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded_whole(assign: bool) -> None:
    module = make((12, 4), seed=3)
    state = copy.deepcopy(module.state_dict())
    assert set(state) == {ORIGINAL, COLUMNS}
    other = make((12, 4), seed=4)
    other.load_state_dict(state, assign=assign)
    assert same_bits(weight_of(other), weight_of(module))
    with torch.device("meta"):
        empty = orthoserde.orthogonal(nn.Linear(4, 12, bias=False), structured=True)
    assert weight_of(empty).shape == (12, 4)  # shapes without elements
    empty.load_state_dict(state, assign=True)
    assert same_bits(weight_of(empty), weight_of(module))


def test_what_is_emptied_is_worked_out_again_when_it_has_been_written() -> None:
    module = make((12, 4), seed=3)
    with torch.device("meta"):
        empty = orthoserde.orthogonal(nn.Linear(4, 12, bias=False), structured=True)
    empty.to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    assert same_bits(weight_of(empty), weight_of(module))


def test_no_random_number_is_used() -> None:
    before = torch.get_rng_state()
    orthoserde.orthogonal(Holder(orthonormal((12, 4))), structured=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_shows_what_it_is() -> None:
    assert repr(link(make((12, 4), "cayley"))) == "Orthogonal(cayley, [12, 4])"


# Properties


@settings(deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 12),
    orthogonal_map=st.sampled_from(MAPS),
    dtype=st.sampled_from(REAL),
    moved=st.sampled_from([0.01, 0.3, 2.0]),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_seed(n: int, k: int, orthogonal_map: str, dtype: torch.dtype, moved: float, seed: int) -> None:
    module = make((n, k), orthogonal_map, dtype, moved=moved, seed=seed)
    # Hardly tall matrices go to torch's matrix_exp whole; in double precision it is off by up to 2e-10 for small ones.
    theirs_off = 1e-9 if orthogonal_map == "matrix_exp" and max(n, k) <= 2 * min(n, k) else 0.0
    expected = in_double(module)
    torch.testing.assert_close(weight_of(module).double(), expected, rtol=0, atol=tolerance(dtype, 200) + theirs_off)
    assert residual(weight_of(module)) <= tolerance(dtype, 200) + theirs_off


def in_double(module: nn.Module) -> Tensor:
    """The weight in double precision from dense matrices, the exponential from eigenvalues."""
    parametrization = link(module)
    original = module.get_parameter(ORIGINAL).detach().double()
    columns = module.get_buffer(COLUMNS)
    tall = original.mT if original.size(0) < original.size(1) else original
    n, k = tall.shape
    if parametrization.orthogonal_map == "householder":
        full = torch.eye(n, dtype=torch.float64)
        for j in range(k):
            vector = tall[:, j].clone()
            vector[:j], vector[j] = 0.0, 1.0
            full = full - 2 * torch.outer(full @ vector, vector) / vector.square().sum()
        mapped = full[:, :k] * tall.diagonal()
    else:
        skew = torch.zeros(n, n, dtype=torch.float64)
        skew[:, :k] = tall.tril(-1)
        skew = skew - skew.mT
        turns, vectors = torch.linalg.eigh(-1j * skew)
        if parametrization.orthogonal_map == "matrix_exp":
            values = torch.exp(1j * turns)
        else:
            values = (1 + 0.5j * turns) / (1 - 0.5j * turns)
        mapped = (vectors @ (values[:, None] * vectors.mH)).real[:, :k]
    weight = complete(columns).double() @ mapped
    return weight.mT if original.size(0) < original.size(1) else weight


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_columns_full_of_zeros_and_equal_numbers(orthogonal_map: str, n: int) -> None:
    """Hadamard matrices and permutations make heads of exactly zero, where rounding decides about signs."""
    hadamard = torch.ones(1, 1)
    while hadamard.size(0) < 2 * n:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    for weight in (hadamard[:, :n] / hadamard.size(0) ** 0.5, torch.eye(2 * n).flip(0)[:, :n], torch.eye(2 * n)[:, :n]):
        pair = [Holder(weight.clone()) for _ in range(2)]
        for module, structured in zip(pair, (True, False), strict=True):
            orthoserde.orthogonal(module, orthogonal_map=orthogonal_map, structured=structured)
            move(module, 0.5)
        torch.testing.assert_close(pair[0].weight, pair[1].weight, rtol=0, atol=tolerance(torch.float32, 100))


def test_every_map_of_torch_has_a_thin_form() -> None:
    assert set(THIN_MAPS) == set(_torch.ORTHOGONAL_MAPS)


def treacherous(k: int, n: int) -> Tensor:
    """Columns whose reflectors nearly repeat each other, so that systems made of their first rows cannot be solved."""
    product = torch.eye(n, dtype=torch.float64)
    for j in range(k):
        vector = torch.zeros(n, dtype=torch.float64)
        vector[j], vector[j + 1 : k], vector[k:] = 1.02, -1.0, -0.1
        vector[j + 1 :] *= (1 - 0.02**2) ** 0.5 / vector[j + 1 :].norm()
        product = product - 2 * torch.outer(product @ vector, vector) / vector.dot(vector)
    return -product[:, :k]


@pytest.mark.parametrize("k", [8, 16, 32, 64])
@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_columns_that_are_hard_to_complete_are_completed_all_the_same(orthogonal_map: str, k: int) -> None:
    ours, theirs = (
        orthoserde.orthogonal(
            Holder(treacherous(k, 2 * k).float()), orthogonal_map=orthogonal_map, structured=structured
        )
        for structured in (True, False)
    )
    for module in (ours, theirs):
        move(module, 0.3)
    torch.testing.assert_close(weight_of(ours), weight_of(theirs), rtol=0, atol=3e-5)
    assert residual(weight_of(ours)) < 1e-5
    probe = torch.randn(2 * k, k)
    gradients = flow(ours, probe), flow(theirs, probe)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-3 * float(gradients[1].abs().max()))


# Columns that are written behind the module's back


def test_columns_that_are_copied_in_place_are_noticed() -> None:
    """As averages of models are made by hand."""
    average, module = make((12, 4), seed=1), make((12, 4), seed=2)
    _ = average.weight
    for mine, theirs in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
        mine.copy_(theirs)
    assert same_bits(weight_of(average), weight_of(module))


def test_columns_of_a_functional_call_are_noticed() -> None:
    one, other = (orthoserde.orthogonal(nn.Linear(12, 4), structured=True) for _ in range(2))
    for seed, module in enumerate((one, other)):
        move(module, 0.3, seed)
    batch = torch.randn(2, 12)
    assert same_bits(torch.func.functional_call(one, other.state_dict(), batch), other(batch))
    assert not torch.equal(one(batch), other(batch))
    for _ in range(5):  # whose tensors may come to lie where others were
        state = {key: value.clone() for key, value in other.state_dict().items()}
        assert same_bits(torch.func.functional_call(one, state, batch), other(batch))


@pytest.mark.parametrize("seed", range(5))
def test_a_cast_there_and_back_leaves_nothing_stale(seed: int) -> None:
    module = make((12, 6), seed=seed)
    module.bfloat16().float()
    other = make((12, 6), seed=seed + 9)
    other.load_state_dict(module.state_dict())
    assert same_bits(weight_of(module), weight_of(other))


def test_a_cast_to_more_precision_makes_it_of_the_columns() -> None:
    module = make((12, 4), "cayley", torch.complex64)
    with pytest.warns(UserWarning, match="Complex modules are a new feature"):
        module.to(torch.complex128)
    other = make((12, 4), "cayley", torch.complex128, seed=3)
    other.load_state_dict(module.state_dict())
    assert torch.equal(weight_of(module), weight_of(other))


def test_a_move_that_moves_nothing_works_nothing_out() -> None:
    module = make((12, 4))
    before = link(module).get_buffer("vectors")
    module.to("cpu").float()
    assert link(module).get_buffer("vectors") is before


def test_what_is_worked_out_in_inference_mode_can_be_trained() -> None:
    module, state = make((12, 4)), make((12, 4), seed=3).state_dict()
    with torch.inference_mode():
        module.load_state_dict(state)
        module.weight  # noqa: B018
    weight_of(module).square().sum().backward()  # type: ignore[no-untyped-call]


def test_a_weight_without_columns_of_its_own_is_empty() -> None:
    for orthogonal_map in MAPS:
        module = orthoserde.orthogonal(Holder(torch.empty(4, 0)), orthogonal_map=orthogonal_map, structured=True)
        assert weight_of(module).shape == (4, 0)


def test_a_weight_of_another_dtype_is_refused_and_changes_nothing() -> None:
    module = make((12, 4))
    before = weight_of(module)
    with pytest.raises(ValueError, match=r"expected torch\.float32 of shape \(12, 4\), got torch\.float64"):
        module.weight = torch.randn(12, 4, dtype=torch.float64)
    assert same_bits(weight_of(module), before)
