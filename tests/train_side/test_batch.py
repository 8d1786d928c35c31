"""A global batch in microbatches: every response token once, fillers weightless, bad batches refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.train_side.batch import TrainBatch
from refit.train_side.microbatches import response_span, split_batch
from refit.train_side.options import TrainOptions, TrainParallel

token_rows = st.lists(st.lists(st.integers(0, 258), min_size=1, max_size=9), min_size=1, max_size=12)


def batch_of(prompts, responses):
    return TrainBatch(
        tuple(map(tuple, prompts)),
        tuple(map(tuple, responses)),
        tuple(tuple(-0.5 - i for i in range(len(response))) for response in responses),
        tuple(float(i) for i in range(len(prompts))),
    )


@given(token_rows, st.integers(1, 4), st.integers(1, 3), st.randoms())
@settings(max_examples=60, deadline=None)
def test_every_response_token_is_a_target_once_over_all_ranks(prompts, num_microbatches, data_size, rng):
    responses = [[rng.randrange(259) for _ in range(rng.randrange(1, 9))] for _ in prompts]
    batch = batch_of(prompts, responses)
    found = {}
    for data_rank in range(data_size):
        microbatches = split_batch(batch, num_microbatches, data_rank, data_size, tensor_size=3)
        assert len(microbatches) == num_microbatches
        assert microbatches[0].length % 3 == microbatches[0].length % 8 == 0
        for part in microbatches:
            assert part.tokens.shape == part.mask.shape == microbatches[0].tokens.shape
            for row, sample in enumerate(part.sample_index):
                places = part.mask[row].nonzero().flatten().tolist()
                if sample < 0:
                    assert places == [] and part.advantages[row] == 0
                    continue
                assert sample not in found
                found[sample] = part.targets[row, places].tolist()
                span = response_span(batch, sample)
                assert places == list(range(span.start, span.stop))
                assert part.old_logprobs[row, places].tolist() == list(batch.old_logprobs[sample])
                assert part.advantages[row] == batch.advantages[sample]
    assert found == dict(enumerate(responses))


def test_a_batch_that_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="same number"):
        TrainBatch(((1,),), ((2,),), ((-1.0,),), (0.0, 1.0))
    with pytest.raises(ValueError, match="sample 0: prompt"):
        TrainBatch(((),), ((2,),), ((-1.0,),), (0.0,))
    with pytest.raises(ValueError, match="2 response tokens but 1 old_logprobs"):
        TrainBatch(((1,),), ((2, 3),), ((-1.0,),), (0.0,))
    with pytest.raises(ValueError, match="at least 1"):
        TrainBatch((), (), (), ())


def test_a_layout_that_cannot_be_is_refused_with_the_way_out():
    assert TrainParallel(tensor=2, gtp=2, pipeline=3, data=2).world_size == 24
    with pytest.raises(ValueError, match=r"expert \(4\).*does not divide.*raise data or lower expert"):
        TrainParallel(expert=4, data=2)
    with pytest.raises(ValueError, match="virtual_pipeline 2 needs pipeline > 1"):
        TrainParallel(virtual_pipeline=2)
    with pytest.raises(ValueError, match="tensor is 0"):
        TrainParallel(tensor=0)
    with pytest.raises(ValueError, match="precision"):
        TrainOptions(precision="fp8")
    with pytest.raises(ValueError, match="clip_ratio"):
        TrainOptions(clip_ratio=0.0)
