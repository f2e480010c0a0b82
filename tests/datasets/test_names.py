"""Lists of names: pickles can do no harm, odd bytes and line ends do no damage."""

import os
import pickle

import pytest

from lgvq_plugin.datasets.captions import read_captions, read_lines
from lgvq_plugin.datasets.listed import read_name_pickle
from lgvq_plugin.datasets.splits import choose_split
from lgvq_plugin.sockets import ConfigError


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("protocol", range(6))
def test_names_come_back_from_any_protocol(tmp_path, protocol):
    names = ["002.Laysan_Albatross/Laysan_Albatross_0002_1027", "17"]
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(names, protocol=protocol))
    assert read_name_pickle(tmp_path / "a.pickle") == names


def test_names_written_by_python_2_come_back(tmp_path):
    # What pickle.dump(["17", "018"], file) of Python 2.7 writes.
    (tmp_path / "a.pickle").write_bytes(b"(lp0\nS'17'\np1\naS'018'\np2\na.")
    assert read_name_pickle(tmp_path / "a.pickle") == ["17", "018"]


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, protocol):
    mark = tmp_path / "owned"
    content = pickle.dumps(["17", Payload(mark)], protocol=protocol)
    (tmp_path / "a.pickle").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.pickle.*refused, as a pickle can run code"):
        read_name_pickle(tmp_path / "a.pickle")
    assert not mark.exists()
    pickle.loads(content)  # the payload is a real one
    assert mark.exists()


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps([["nested"]]), b"\x80\x05]"]
)
def test_another_pickle_is_refused(tmp_path, content):
    (tmp_path / "a.pickle").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.pickle: expected a pickled list"):
        read_name_pickle(tmp_path / "a.pickle")


def test_lines_of_any_make(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa dog \r\n\r\n  a caf\xe9 bird\r\nlast")
    assert read_lines(tmp_path / "a.txt") == ["a dog", "a caf� bird", "last"]
    assert read_captions(tmp_path / "none.txt") == ()


def test_splits_have_aliases_and_suggestions():
    assert choose_split("valid", ("train", "validation")) == "validation"
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        choose_split("trian", ("train", "validation"))
