import threading
from collections import OrderedDict

import torch

from dist_fusion.checkpoint.copies import Copies


class Scaler:
    scale = 8


def test_copies_are_of_the_moment_and_the_originals_may_change_as_soon_as_they_are_taken():
    weights, tied = torch.arange(6.0).view(2, 3), torch.ones(4)
    state = {"a": weights, "tied": [tied, tied.view(4)], "scaler": Scaler(), "step": 3, "shape": torch.Size([2, 3])}
    copies = Copies(torch.device("cpu"))
    frozen = copies.freeze([state, OrderedDict(b=weights.T)])
    state["scaler"].scale, state["step"] = 4, 4
    taken: list = []
    thread = threading.Thread(target=lambda: taken.extend(copies.take(frozen)))
    thread.start()
    copies.hold()
    weights += 100
    thread.join()
    first, second = taken
    assert first["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert second["b"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert (first["scaler"].scale, first["step"]) == (8, 3)
    assert type(first["shape"]) is torch.Size
    assert first["tied"][0] is first["tied"][1], "what is stored once stays so"
    assert first["a"].data_ptr() != weights.data_ptr()


def test_the_memory_of_a_save_serves_the_next_one():
    copies = Copies(torch.device("cpu"))
    places = []
    for value in (1.0, 2.0):
        state = {"a": torch.full((5,), value), "b": torch.full((5,), -value), "c": torch.full((5,), value).half()}
        (taken,) = copies.take(copies.freeze([state]))
        assert [taken[name][0].item() for name in "abc"] == [value, -value, value]
        places.append([taken[name].data_ptr() for name in "abc"])
    assert places[0] == places[1]
    assert len(set(places[0])) == 3
