"""Files that are written whole or not at all, whatever ends the writing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoaccum.files import open_own, partial_of, partial_path, read_json, whole_file, write_json

ROOT = Path(__file__).parents[1]


def test_what_was_there_stays_where_the_writing_fails(tmp_path):
    path = tmp_path / "plan.json"
    write_json(path, {"k": 4})
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half")
        file.flush()
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"k": 4}
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_refuses_the_renaming_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "plan.json", {"k": 4})
    assert not list(tmp_path.iterdir())


def test_others_may_read_it_as_far_as_the_umask_lets_them(tmp_path):
    code = "import os, sys, pathlib; os.umask(0o027); from autoaccum.files import write_json; "
    code += "write_json(pathlib.Path(sys.argv[1]), [1])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "new.json"], check=True, env={"PYTHONPATH": str(ROOT)})
    assert (tmp_path / "new.json").stat().st_mode & 0o777 == 0o640


def test_several_processes_may_write_the_same_file_at_once(tmp_path):
    code = "import sys, pathlib; from autoaccum.files import write_json\n"
    code += "for _ in range(100): write_json(pathlib.Path(sys.argv[1]), list(range(int(sys.argv[2]))))"
    path = tmp_path / "shared.json"
    writers = [
        subprocess.Popen([sys.executable, "-c", code, path, str(length)], env={"PYTHONPATH": str(ROOT)})
        for length in (2000, 3000)
    ]
    lengths = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            lengths.add(len(json.loads(path.read_text())))
    assert [writer.returncode for writer in writers] == [0, 0]
    assert lengths <= {2000, 3000}
    assert lengths
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_ours_is_not_written_through_a_symbolic_link(tmp_path):
    target, link = tmp_path / "theirs", tmp_path / "metrics.jsonl"
    target.write_text("kept")
    link.symlink_to(target)
    for mode in ("a", "r+b", "wb", "xb"):
        with pytest.raises(OSError, match=r"symbolic link|File exists"):
            open_own(link, mode)
    write_json(link, [1])  # replaces the link
    assert (target.read_text(), link.is_symlink()) == ("kept", False)


def test_half_written_files_have_names_that_nobody_guesses_and_only_these_are_known_again(tmp_path):
    names = {partial_path(tmp_path / "plan.json").name for _ in range(50)}
    assert len(names) == 50
    assert {partial_of(Path(name)) for name in names} == {"plan.json"}
    assert [partial_of(Path(name)) for name in (".plan.json.tmp", ".notes.tmp", "plan.json", ".a.0123abcd.tmp")] == [
        None
    ] * 4


def test_what_need_not_be_shared_is_its_owners_alone(tmp_path):
    write_json(tmp_path / "private.json", [1], private=True)
    assert (tmp_path / "private.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "1e999", "-Infinity", "NaN", '{"a": [1e400]}', "1" * 5000, str(2**64), str(-(2**63) - 1),
        "[" * 100_000, "[" * 40 + "]" * 40, '{"a":' * 50 + "1" + "}" * 50,
    ],
)  # fmt: skip
def test_json_out_of_bounds_is_one_kind_of_error(tmp_path, text):
    path = tmp_path / "values.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r".") as raised:
        read_json(path)
    assert len(str(raised.value)) < 200


def test_a_checksum_holds_the_values_and_not_their_layout(tmp_path):
    path, values = tmp_path / "values.json", {"b": [1, 0.1, (2, None)], "a": {"c": "é"}}
    write_json(path, values, checksum=True)
    assert read_json(path) == {"b": [1, 0.1, [2, None]], "a": {"c": "é"}}
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    read_json(path)
    path.write_text(path.read_text().replace("0.1", "0.2"))
    with pytest.raises(ValueError, match="its checksum is not that of its values"):
        read_json(path)
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "checksum"})
    )
    assert read_json(path)["b"][1] == 0.2
