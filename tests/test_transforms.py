"""The algebra of Winograd's convolution: the matrices, and products with them."""

import numpy as np
import pytest

from resnet.backends.cpu.transforms import FORMS, TILE, from_points, matrices, to_points


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def filters(form, g):
    """The filter at all points."""
    kinds = form.filters @ g
    return kinds[np.minimum(np.arange(len(form.read)), len(kinds) - 1)]


def test_the_transforms_are_those_of_a_correlation():
    """A^T [(G g) * (B^T d)] has the four values of a filter of three over six inputs."""
    rng = np.random.default_rng(0)
    d, g = rng.standard_normal(6), rng.standard_normal(3)
    y = FORMS[1].write.T @ ((FORMS[1].filters @ g) * (FORMS[1].read @ d))
    np.testing.assert_allclose(y, np.correlate(d, g, "valid"), rtol=1e-12)


@pytest.mark.parametrize("taps", [2, 3, 4])
def test_a_filter_of_some_taps_takes_one_product_less_than_outputs_and_taps(taps, rng):
    points = [0, 1, -1, 2, -2, 0.5, -0.5][: TILE + taps - 2]
    a, g, bt = matrices(points, taps)
    x, w = rng.standard_normal(TILE + taps - 1), rng.standard_normal(taps)
    assert len(a) == len(g) == len(bt) == len(x)
    np.testing.assert_allclose(a.T @ ((g @ w) * (bt @ x)), np.correlate(x, w, "valid"), rtol=1e-12)


@pytest.mark.parametrize(("stride", "products"), [(1, 6), (2, 9)])
def test_four_outputs_are_those_of_a_correlation(stride, products, rng):
    form = FORMS[stride]
    x, g = rng.standard_normal(form.read.shape[1]), rng.standard_normal(3)
    y = form.write.T @ (filters(form, g) * (form.read @ x))
    assert len(form.read) == products
    np.testing.assert_allclose(y, np.correlate(x, g, "valid")[::stride], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", FORMS)
def test_the_gradient_of_the_filter_is_that_of_the_correlation(stride, rng):
    """Of the turned filter: from the input as it is, and the output's gradient with its ends."""
    form = FORMS[stride]
    x, gy = (rng.random(each.shape[1]) for each in (form.write_back, form.read_back))
    sums = np.zeros(len(form.filters))
    at_points = (form.read_back @ gy) * (form.write_back @ x)
    np.add.at(sums, np.minimum(np.arange(len(at_points)), len(sums) - 1), at_points)
    expected = np.zeros(3)
    for output, value in enumerate(gy, -1):
        for tap in range(3):
            pixel = stride * output + tap - 1
            if 0 <= pixel < len(x):
                expected[tap] += value * x[pixel]
    np.testing.assert_allclose((form.filters.T @ sums)[::-1], expected, rtol=1e-12)


@pytest.mark.parametrize("stride", FORMS)
def test_the_gradient_of_the_input_is_that_of_the_correlation(stride, rng):
    """Input 0 is beside output 0; the filter is turned, and goes from outputs to inputs."""
    form = FORMS[stride]
    g, gy = rng.standard_normal(3), rng.standard_normal(form.read_back.shape[1])  # from -1 on
    gx = form.write_back.T @ (filters(form, g[::-1]) * (form.read_back @ gy))
    expected = np.zeros(len(gx))
    for output, value in enumerate(gy, -1):
        for tap in range(3):
            pixel = stride * output + tap - 1
            if 0 <= pixel < len(gx):
                expected[pixel] += value * g[tap]
    assert len(gx) == stride * TILE
    np.testing.assert_allclose(gx, expected, rtol=1e-12, atol=1e-12)


MATRICES = [
    pytest.param(getattr(form, name), id=f"{name}-{stride}")
    for stride, form in FORMS.items()
    for name in form._fields
]


@pytest.mark.parametrize("matrix", MATRICES)
def test_going_to_the_points_is_a_product_with_the_matrix(matrix, rng):
    x = rng.standard_normal(matrix.shape[1])
    np.testing.assert_allclose(to_points(matrix, x), matrix @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("matrix", [m for m in MATRICES if not m.id.startswith("read")])
def test_coming_back_is_a_product_with_the_transposed_matrix(matrix, rng):
    m = rng.standard_normal(len(matrix))
    np.testing.assert_allclose(from_points(matrix, m), matrix.T @ m, rtol=1e-12, atol=1e-12)


class Counted:
    """Something of which sums and differences are counted: a product goes into one of them."""

    sums = 0

    def __add__(self, other):
        Counted.sums += 1
        return self

    __sub__ = __add__

    def __rmul__(self, factor):
        return self


@pytest.mark.parametrize("matrix", [m for m in MATRICES if not m.id.startswith("filters")])
def test_a_point_and_its_negative_share_their_terms(matrix, monkeypatch):
    monkeypatch.setattr(Counted, "sums", 0)
    to_points(matrix, [Counted()] * matrix.shape[1])
    assert Counted.sums < np.count_nonzero(matrix) - len(matrix)
