"""Names and shapes of a checkpoint's tensors, and parts of them."""

import pytest
import torch
from tensor_sources import make_source

from layerskip.checkpoint.loading.tensors import EMBEDDING, HEAD, Part, check_names, with_own_head
from layerskip.errors import WeightsError


def test_missing_tensors() -> None:
    config, source = make_source()
    names = source.names() - {"model.norm.weight", "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(WeightsError) as error:
        check_names(config, names)
    for words in ("lacks 2 of 21", "'model.layers.1.mlp.up_proj.weight'", "incomplete"):
        assert words in str(error.value)


def test_unknown_tensors() -> None:
    config, source = make_source()
    with pytest.raises(WeightsError) as error:
        check_names(config, source.names() | {"model.layers.0.self_attn.q_proj.bias"})
    for words in ("1 tensors", "'llama'", "'model.layers.0.self_attn.q_proj.bias'", "config.json"):
        assert words in str(error.value)


def test_tensors_that_never_matter() -> None:
    """A copy of a tied head, and the tables of frequencies that old checkpoints carry."""
    config, source = make_source(tie_word_embeddings=True)
    check_names(config, source.names() | {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"})


@pytest.mark.parametrize("part", [Part.rows(0, 4), Part.rows(2, 3), Part.columns(1, 5)])
def test_parts_within_a_tensor(part: Part) -> None:
    part.check("weight", (4, 5))
    whole = torch.arange(20).view(4, 5)
    assert part.shape_of((4, 5)) == whole.narrow(part.dim, part.start, part.stop - part.start).shape


@pytest.mark.parametrize("part", [Part.rows(0, 5), Part.rows(2, 2), Part.rows(3, 2), Part.columns(-1, 3)])
def test_parts_beyond_a_tensor(part: Part) -> None:
    with pytest.raises(WeightsError, match=rf"'weight' has shape \(4, 5\), and .* {part.start} to {part.stop - 1} "):
        part.check("weight", (4, 5))


@pytest.mark.parametrize(("row", "tied"), [(None, True), (0, False), (23, False)])
def test_a_head_that_differs_in_any_row_is_one_of_its_own(row: int | None, tied: bool) -> None:
    config, source = make_source(tie_word_embeddings=True)
    head = source.tensors[EMBEDDING].clone()
    if row is not None:
        head[row] += 1
    source.tensors[HEAD] = head
    assert with_own_head(config, source).tie_word_embeddings == tied
    source.tensors[HEAD] = torch.cat((head, head))
    assert not with_own_head(config, source).tie_word_embeddings
