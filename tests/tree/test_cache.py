import numpy as np
import pytest
from vgrad_eqx._tree.cache import Cache, is_equal


class Raises:
    """What hashes, and raises when it is compared, as a static array in a structure does."""

    def __hash__(self):
        return 0

    def __eq__(self, other):
        raise ValueError("ambiguous")


UNKNOWN = {"no hash": [], "raises": Raises()}


@pytest.mark.parametrize("key", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_what_does_not_compare_is_not_known(key):
    cache = Cache()
    cache.set(Raises(), "other")
    cache.set(key, "value")
    assert cache.get(key) is None


def test_a_full_cache_is_emptied():
    cache = Cache(max_size=2)
    for i in range(3):
        cache.set(i, str(i))
    assert [cache.get(i) for i in range(3)] == [None, None, "2"]


def test_equality_of_what_may_not_compare():
    array = np.ones(2)
    assert is_equal(array, array)
    assert not is_equal(array, np.ones(2))
    assert not is_equal(1, True)
    assert not is_equal(Raises(), Raises())
    assert is_equal("a", "a")
