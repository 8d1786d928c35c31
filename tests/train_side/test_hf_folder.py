"""Names of a checkpoint's tensors, found without a search."""

from refit.train_side.hf_folder import NameList


class Counted(str):
    """A name that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Counted.compared += 1
        return super().__eq__(other)


def test_a_list_of_names_is_a_list_that_is_not_searched():
    names = [f"layers.{i}.weight" for i in range(1000)]
    found = NameList(names)
    assert found == names and found[3] == "layers.3.weight"
    assert Counted("layers.999.weight") in found and Counted("layers.1000.weight") not in found
    assert Counted.compared <= 2
