"""However attention is computed, it is softmax(query key' / sqrt(channel)) value, and so are its gradients."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from meamtm.model.attention import CHUNK, SHORT, attend, attend_in_chunks

LENGTHS = [1, 48, SHORT, SHORT + 1, 700]


def heads(num_tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value and a gradient of their outcome, laid out as a linear layer gives them."""
    generator = torch.Generator().manual_seed(num_tokens)
    packed = torch.randn(2, num_tokens, 4, 3, 16, generator=generator).to(dtype)  # (batch, token, which, head, channel)
    return [each.requires_grad_() for each in packed.permute(2, 0, 3, 1, 4).unbind(0)]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Has torch work on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def exactly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(2, 3) / query.shape[3] ** 0.5).softmax(3) @ value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_values_and_gradients_are_those_of_the_formula(num_tokens: int, dtype: torch.dtype) -> None:
    *inputs, upstream = heads(num_tokens, dtype)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    found, expected = attend(*inputs), exactly(*exact)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    assert found.dtype == dtype
    found_gradients = torch.autograd.grad(found, inputs, upstream)
    for ours, theirs in zip(found_gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)  # three at a time leave two heads for the last chunk
@pytest.mark.parametrize("num_tokens", [3, 1_000])
def test_chunks_change_nothing_but_memory(num_tokens: int, threads: int) -> None:
    """In float32, where rounding hides nothing; of 8 heads a thread takes one at a time of 1,000 tokens."""
    *inputs, upstream = heads(num_tokens)
    assert (round(CHUNK / num_tokens**2) == 1) == (num_tokens == 1_000)
    assert torch.get_num_threads() == threads
    found, expected = attend_in_chunks(*inputs), exactly(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    gradients = (torch.autograd.grad(each, inputs, upstream) for each in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_are_masked_are_not_heard(dtype: torch.dtype) -> None:
    query, key, value, _ = heads(300, dtype)
    mask = torch.arange(300).expand(2, 1, 1, 300) < torch.tensor([300, 170]).view(2, 1, 1, 1)
    found = attend(query, key, value, mask)[1, :, :170]
    alone = attend(*(each[1:, :, :170] for each in (query, key, value)))[0]
    torch.testing.assert_close(found, alone, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-5)
