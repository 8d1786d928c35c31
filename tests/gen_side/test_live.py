"""An engine says what it runs, and its workers must agree on it."""

from types import SimpleNamespace

import pytest

from refit.gen_side.live.configuration import (
    NOT_ASKED,
    ONE_RANK,
    EngineDescription,
    WorkerFacts,
    stale_draft,
    why_not_sequence_parallel,
)
from refit.transfer.errors import TransportError


@pytest.mark.parametrize(
    ("live", "reason"),
    [
        ((True, 2, "", True), ""),
        ((False, 2, "", True), NOT_ASKED),
        ((True, 1, "", True), ONE_RANK),
        ((True, 2, "NONE", True), "compilation mode NONE runs no passes"),
        ((True, 2, "", False), "the graph is compiled in pieces, which the pass cannot rewrite"),
    ],
)
def test_sequence_parallelism_is_on_only_where_the_pass_can_run(live, reason):
    assert why_not_sequence_parallel(*live) == reason


def workers(**odd):
    whole = [
        WorkerFacts(tensor, stage, ((0, 2), (2, 4))[stage], "", False)
        for stage in (0, 1)
        for tensor in (0, 1)
    ]
    last = {field: getattr(whole[-1], field) for field in WorkerFacts.__slots__}
    return [*whole[:-1], WorkerFacts(**last | odd)]


def test_an_engine_is_described_by_its_workers():
    found = EngineDescription.of(workers())
    assert found == EngineDescription(2, 2, ((0, 2), (2, 4)), True, "", False)
    assert str(found) == "TP2 PP2, layers 0 to 1 | layers 2 to 3, sequence parallel on"
    assert found.message()["sequence_parallel"] is True


@pytest.mark.parametrize(("what", "value"), [("sequence_off", NOT_ASKED), ("prompt_embeds", True)])
def test_workers_of_one_engine_that_differ_are_no_engine(what, value):
    with pytest.raises(TransportError, match=what):
        EngineDescription.of(workers(**{what: value}))


def test_an_engine_with_a_draft_model_says_that_no_refit_reaches_it():
    target, draft = SimpleNamespace(model="policy"), SimpleNamespace(model="some/eagle")

    def notice(method: str, drafts: SimpleNamespace) -> str:
        speculative = SimpleNamespace(method=method, draft_model_config=drafts, target_model_config=target)
        return stale_draft(SimpleNamespace(speculative_config=speculative))

    assert stale_draft(SimpleNamespace(speculative_config=None)) == ""
    assert notice("ngram", target) == "", "vLLM puts the target there"
    said = notice("eagle", draft)
    assert "'eagle' with draft model 'some/eagle', which no refit reaches" in said and "'ngram'" in said
