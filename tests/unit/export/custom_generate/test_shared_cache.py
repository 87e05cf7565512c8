"""One length for all layers, room that grows, rows that move."""

import torch

from layerskip.export.custom_generate.rows import Rows
from layerskip.export.custom_generate.shared_cache import SharedCache


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_all_layers_write_behind_the_past_that_was_set() -> None:
    cache = SharedCache(4)
    first, second = states(2, 1, 3, 4), states(2, 1, 2, 4)
    cache.update(first, first, 0)
    cache.past = 3
    keys, values = cache.update(second, second * 2, 0)
    assert torch.equal(keys, torch.cat([first, second], dim=2))  # it had to grow
    assert torch.equal(values[:, :, 3:], second * 2)
    assert (cache.get_seq_length(), cache.get_mask_sizes(2, 1), cache.get_query_offset()) == (3, (5, 0), 3)
    cache.past = 1  # rejected: what is behind it is overwritten
    keys, _ = cache.update(second, second, 0)
    assert torch.equal(keys, torch.cat([first[:, :, :1], second], dim=2))


def test_masks_of_older_versions_ask_with_positions() -> None:
    cache = SharedCache(4)
    cache.past = 5
    assert cache.get_mask_sizes(torch.arange(5, 8), 0) == (8, 0)


def test_rows_that_accept_less_move_to_the_right_and_back() -> None:
    prompts = torch.tensor([[5, 6, 7], [0, 8, 9]])
    rows, cache = Rows(prompts, [0, 1], 20), SharedCache(20)
    tokens = torch.arange(20).view(1, 1, 20, 1).float() + torch.tensor([100.0, 200.0]).view(2, 1, 1, 1)
    cache.update(tokens[:, :, :3], tokens[:, :, :3], 0)
    cache.past = 3
    assert rows.positions(3, 1).tolist() == [[3], [2]]
    rows.commit([1, 1], cache)  # the first token, which has no keys yet
    assert (cache.past, rows.mask(3, 1).tolist()) == (3, [[1, 1, 1, 1], [0, 1, 1, 1]])

    cache.update(tokens[:, :, 3:6], tokens[:, :, 3:6], 0)  # the pending token and two drafts
    rows.commit([3, 1], cache)
    keys, _ = cache.update(tokens[:, :, 6:7], tokens[:, :, 6:7], 0)
    assert cache.past == 6
    assert keys[0, 0, :, 0].tolist() == [100, 101, 102, 103, 104, 105, 106]
    assert keys[1, 0, 3:, 0].tolist() == [201, 202, 203, 206]
    assert rows.mask(6, 1).tolist() == [[1] * 7, [0, 0, 0, 1, 1, 1, 1]]
    assert rows.positions(6, 1).tolist() == [[6], [3]]

    cache.update(tokens[:, :, 6:9], tokens[:, :, 6:9], 0)
    rows.commit([1, 3], cache)
    keys, _ = cache.update(tokens[:, :, 9:10], tokens[:, :, 9:10], 0)
    assert keys[0, 0, :, 0].tolist() == [100, 101, 102, 103, 104, 105, 106, 109]
    assert keys[1, 0, 1:, 0].tolist() == [201, 202, 203, 206, 207, 208, 209]


def test_columns_that_are_padding_in_all_rows_are_not_run() -> None:
    rows = Rows(torch.tensor([[0, 0, 3], [0, 4, 5]]), [2, 1], 10)
    assert rows.prompts.tolist() == [[0, 3], [4, 5]]
    assert rows.mask(0, 2).tolist() == [[0, 1], [1, 1]]
    assert rows.positions(0, 2).tolist() == [[0, 0], [0, 1]]
