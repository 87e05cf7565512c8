"""Which tokens drafts are chosen among."""

from layerskip.checkpoint.loading.vocabulary import frequent_tokens


def test_frequent_tokens() -> None:
    assert frequent_tokens([], 3, 10) == (0, 1, 2)
    assert frequent_tokens([7, 7, 5, 5, 5, 9], 2, 10) == (5, 7)
    assert frequent_tokens([7, 7], 3, 10, first=(4,)) == (0, 4, 7)
    assert frequent_tokens([3], 10, 10) == tuple(range(10))
