"""Files that are written whole or not at all, whatever ends the writing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoaccum.files import whole_file, write_json

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
