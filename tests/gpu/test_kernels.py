"""The bucket kernels on a device against torch views on the CPU, bit for bit."""

import pytest
import torch

from refit.transfer.kernels import reference, triton_bucket
from refit.transfer.kernels.table import copy_table, digest_table
from tests.transfer.test_kernels import NUM_SUMS, as_flat_bytes, make_bucket


@pytest.mark.parametrize("seed", range(100))
def test_a_bucket_on_the_device_is_the_one_that_torch_makes_on_the_cpu(seed):
    device = torch.device("cuda")
    params, boxes, num_bytes = make_bucket(seed)
    there = [param.to(device) for param in params]
    bases = triton_bucket.base_addresses(there, device)
    table = copy_table(boxes, device)
    packed = torch.full((num_bytes,), 0xA5, dtype=torch.uint8, device=device)
    expected = torch.full((num_bytes,), 0xA5, dtype=torch.uint8)
    triton_bucket.pack(table, bases, packed)
    reference.pack(boxes, params, expected)
    assert torch.equal(packed.cpu(), expected)

    sums, wanted = (
        torch.zeros(NUM_SUMS, dtype=torch.int64, device=device),
        torch.zeros(NUM_SUMS, dtype=torch.int64),
    )
    triton_bucket.add_digests(digest_table(boxes, device, of_bucket=True), bases, packed, sums)
    reference.add_digests(boxes, [reference.packed_box(box, expected) for box in boxes], wanted)
    assert torch.equal(sums.cpu(), wanted)

    got, held = [torch.zeros_like(param) for param in there], [torch.zeros_like(param) for param in params]
    triton_bucket.unpack(table, triton_bucket.base_addresses(got, device), packed)
    reference.unpack(boxes, held, expected)
    for left, right in zip(got, held, strict=True):
        assert torch.equal(as_flat_bytes(left.cpu()), as_flat_bytes(right))
