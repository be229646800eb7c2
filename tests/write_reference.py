"""Writes the reference of keywords into examples/README.md: python -m tests.write_reference"""

from pathlib import Path

from autoaccum.settings import reference

BEGIN, END = "<!-- keywords: written by tests/write_reference.py -->\n", "<!-- end of keywords -->\n"


def main() -> None:
    guide = Path(__file__).parent.parent / "examples" / "README.md"
    text = guide.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    guide.write_text(before + BEGIN + "\n" + reference() + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
