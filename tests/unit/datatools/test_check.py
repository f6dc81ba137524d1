"""Every problem is found where it is, and the mended copy has none."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt.data import tokenizer as tokenizers
from minigpt.data.encodings import CONTROL_BYTES, FEW_NULS
from minigpt.data.formats import parse_row
from minigpt.data.store import Limits, open_store
from minigpt.data.tables import SIGNATURES
from minigpt.datatools.check import Checker, Findings, as_row
from minigpt.errors import DataError

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def chat(question: str, answer: str) -> dict[str, object]:
    return json.loads(json.dumps(GOOD).replace("hi", question).replace("yo", answer))  # type: ignore[no-any-return]


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, object]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def line(row: object) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


BAD = {
    "bad_utf8": ("text", '{"text": "caf\xe9 cr\xe8me"}'.encode("latin-1"), "neither UTF-8"),
    "bad_json": ("text", b'{"text": "a"', "cut off"),
    "missing_key": ("text", line({"txt": "a"}), "its keys are"),
    "wrong_type": ("text", line({"text": 3}), "must be a string"),
    "empty": ("text", line({"text": " "}), "is empty"),
    "lone_surrogate": ("text", b'{"text": "\\ud800"}', "lone surrogate"),
    "special_token": ("text", line({"text": "a<|im_end|>"}), "special token"),
    "role_order": ("chat", line({"messages": [GOOD["messages"][1]]}), "'user' must come"),
    "no_assistant": ("chat", line({"messages": [GOOD["messages"][0]]}), "no assistant"),
    "unknown_role": ("chat", line(chat("a", "b")).replace(b"user", b"usr"), "'usr'"),
    "weight": ("chat", line(chat("a", "b")).replace(b"}]", b', "weight": 0.5}]'), "0 or 1"),
    "no_targets": ("chat", line(chat("a", "b")).replace(b"}]", b', "train": false}]'), "no answer"),
    "part_type": ("chat", line(chat("a", "b")).replace(b'"a"', b'[{"type": "image"}]'), "'image'"),
    "same_answers": ("preference", line(pair("a", "b", "b")), "equals 'chosen'"),
    "prompt_mismatch": (
        "preference",
        line({"chosen": GOOD["messages"], "rejected": chat("other", "c")["messages"]}),
        "exactly the messages",
    ),
}
ROWS: dict[str, Any] = {"text": {"text": "good"}, "chat": GOOD, "preference": pair("a", "b", "c")}


@pytest.mark.parametrize("reason", BAD)
def test_an_error_is_found_at_its_line(reason: str, write: Any, minigpt: Any) -> None:
    kind, bad, words = BAD[reason]
    path = write([ROWS[kind], bad])
    outcome = minigpt("data", "check", path)
    assert outcome.status == 2
    line = next(text for text in outcome.out.splitlines() if f"[{reason}]" in text)
    assert line.startswith(f"error: {path}:2:")
    assert words in line
    assert ". " in line  # what to do comes after what is wrong
    assert "2 rows checked: 1 error, 0 hints" in outcome.out
    assert outcome.err == f"minigpt: 1 error in {path}; see above\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"\xef\xbb\xbf" + line({"text": "a"}), "bom"),
        ('{"text": "你好，世界。"}'.encode("gbk"), "encoding"),
        (b'{"text": "a\x00"}', "control_character"),
        (b'{"text": "a\\u0007"}', "control_character"),
        (line({"text": "a\x85"}), "control_character"),
        (line({"text": "a\ufffd"}), "replacement_character"),
    ],
)
def test_a_hint_is_no_error(row: bytes, reason: str, write: Any, minigpt: Any) -> None:
    path = write([row])
    outcome = minigpt("data", "check", path)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith(f"hint: {path}:1: ")
    assert f"[{reason}]" in outcome.out
    assert "1 row checked: 0 errors, 1 hint" in outcome.out


def test_fields_that_are_not_used_are_named_once_a_file(
    write: Any, minigpt: Any, tokenizer_dir: Path, tmp_path: Path, caplog: Any
) -> None:
    rows: list[Any] = [chat("a", str(number)) for number in range(4)]
    rows[1]["tools"] = [{"type": "function"}]
    for row in rows[2:]:
        row["messages"][1] |= {"tool_calls": [{"type": "function"}], "weight": 1}
    path = write(rows)
    message = f"{path}: its rows have tool_calls, tools, of which training makes no use"
    with caplog.at_level("WARNING"):
        open_store(path, "chat", tokenizers.load(tokenizer_dir), Limits(), tmp_path / "cache")
    assert [record.message for record in caplog.records if "its rows" in record.message] == [
        message
    ]
    outcome = minigpt("data", "check", path)
    assert outcome.status == 0
    assert [t for t in outcome.out.splitlines() if "tool_calls" in t] == [
        f"hint: {message}. Nothing needs to be done where the text alone is to be learnt. "
        "[unused_fields]"
    ]


def test_good_files_of_every_form_are_clean(write: Any, tmp_path: Path, minigpt: Any) -> None:
    text = write([{"text": "Ünïcödé 👩‍👧 \t naïve 龘"}], "text.jsonl")
    array = tmp_path / "array.json"
    array.write_text(json.dumps([chat("a", "b"), chat("c", "d")], indent=1))
    zipped = tmp_path / "pairs.jsonl.gz"
    zipped.write_bytes(gzip.compress(line(pair("p", "q", "r")) + b"\r\n"))
    outcome = minigpt("data", "check", text, array, zipped)
    assert outcome == (0, "4 rows checked: 0 errors, 0 hints\n", "")


def test_what_cannot_be_read_is_reported_beside_the_rest(
    write: Any, tmp_path: Path, minigpt: Any
) -> None:
    damaged = tmp_path / "cut.jsonl.gz"
    damaged.write_bytes(gzip.compress(line(GOOD) * 50)[:-20])
    empty = write([], "empty.jsonl")
    missing = tmp_path / "missing.jsonl"
    outcome = minigpt("data", "check", damaged, empty, missing, write([GOOD]))
    assert outcome.status == 2
    for path, reason in (
        (damaged, "bad_compression"),
        (empty, "no_rows"),
        (missing, "missing_file"),
    ):
        assert any(str(path) in t and f"[{reason}]" in t for t in outcome.out.splitlines())
    assert outcome.err == f"minigpt: 3 errors in {damaged}, {empty}, {missing}; see above\n"


def test_fix_mends_what_is_safe_and_changes_nothing_else(
    write: Any, tmp_path: Path, minigpt: Any
) -> None:
    odd = b'{"text":  "kept \\u4f60 as it is", "id": 1e5, "note": "\\ud800"}'
    rows = [
        b"\xef\xbb\xbf" + odd,
        '{"text": "你好，世界。"}'.encode("gb18030"),
        b'{"text": "bell\\u0007", "note": "\\ud800"}',
        b'{"text": ""}',
        odd.replace(b"  ", b" "),
        b'{"text": "nul\x00"}\r',
        b"not json",
        line({"text": "lost \ufffd"}),
    ]
    path, out = write(rows), tmp_path / "new" / "fixed.jsonl"
    outcome = minigpt("data", "check", path, "--fix", out)
    assert outcome.status == 2  # of the file that was checked
    assert out.read_bytes().splitlines() == [
        odd,
        '{"text": "你好，世界。"}'.encode(),
        b'{"text": "bell", "note": "\\ud800"}',
        b'{"text": "nul"}',
        line({"text": "lost \ufffd"}),
    ]
    assert f"{out}: 5 rows, 3 left out" in outcome.out
    assert path.read_bytes().splitlines() == b"\n".join([*rows, b""]).splitlines()
    again = minigpt("data", "check", out)
    assert again.status == 0
    assert "0 errors, 1 hint" in again.out


def test_a_record_as_a_row_is_read_as_that_record() -> None:
    row = {"prompt": "u", "chosen": "a", "rejected": "b"}
    for one in (row, {**row, "margin": 0.5}):
        record = parse_row(one, "preference")
        assert parse_row(as_row(record), "preference") == record


def test_fix_turns_other_encodings_and_arrays_into_jsonl(tmp_path: Path, minigpt: Any) -> None:
    path, out = tmp_path / "array.json", tmp_path / "out.jsonl"
    path.write_bytes(json.dumps([GOOD, {"x": 1}, chat("你", "我")], indent=2).encode("utf-16"))
    outcome = minigpt("data", "check", path, "--fix", out)
    assert outcome.status == 2
    assert f"{path}:1: read as UTF-16." in outcome.out
    rows = [json.loads(text) for text in out.read_text("utf-8").splitlines()]
    assert rows == [GOOD, chat("你", "我")]


def test_fix_writes_to_a_new_file_or_not_at_all(write: Any, tmp_path: Path, minigpt: Any) -> None:
    path = write([GOOD])
    bad = write([b"{}"], "bad.jsonl")
    assert "writes to a new one" in minigpt("data", "check", path, "--fix", path).err
    assert "one file at a time" in minigpt("data", "check", path, bad, "--fix", "x").err
    nothing = minigpt("data", "check", bad, "--fix", tmp_path / "out.jsonl")
    missing = minigpt("data", "check", tmp_path / "no", "--fix", tmp_path / "out.jsonl")
    assert "no row is good" in nothing.err
    assert "cannot be mended" in missing.err
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl", "bad.jsonl"}


def test_duplicates_are_found_across_files_and_forms(write: Any, minigpt: Any) -> None:
    first = write([GOOD, chat("a", "b"), GOOD], "a.jsonl")
    second = write([{"instruction": "a", "output": "b"}, {"prompt": "hi", "completion": "yo"}])
    out = minigpt("data", "check", first, second).out
    assert f"hint: {first}:3: the row is the same as {first}:1." in out
    assert f"hint: {second}:1: the row is the same as {first}:2." in out
    assert f"hint: {second}:2: the row is the same as {first}:1." in out
    assert "5 rows checked: 0 errors, 3 hints" in out


def test_near_duplicates_are_found_on_request(write: Any, minigpt: Any) -> None:
    text = "Once upon a time a small fox lived at the edge of a wide green forest, near a river. "
    zh = (
        "从前在一片宽阔的绿色森林边上，靠近一条小河的地方，住着一只很小很小的狐狸，它每天都去河边。"
    )
    rows = [text * 3, text * 3 + "The end.", "Something else.", zh * 2, zh * 2 + "完。", "abc"]
    path = write([{"text": row} for row in rows])
    assert minigpt("data", "check", path).out == "6 rows checked: 0 errors, 0 hints\n"
    out = minigpt("data", "check", path, "--near").out
    assert f"{path}:2: the row is nearly {path}:1." in out
    assert f"{path}:5: the row is nearly {path}:4." in out
    assert "0 errors, 2 hints" in out
    assert "0 errors, 0 hints" in minigpt("data", "check", path, "--near", "1").out
    assert "must be above 0" in minigpt("data", "check", path, "--near", "2").err


def test_overlap_with_validation_data(write: Any, minigpt: Any) -> None:
    long = "what is the way from the old harbour to the new station on a rainy winter morning"
    val = write([chat("q", "a"), chat("same", "one"), chat(long, "walk")], "val.jsonl")
    near = chat(long, "walks")
    path = write([chat("other", "x"), chat("q", "a"), chat("same", "two"), near])
    outcome = minigpt("data", "check", path, "--val", val, "--near", "0.7")
    assert outcome.status == 2
    assert f"error: {path}:2: the row is in the validation data, too: {val}:1." in outcome.out
    assert f"hint: {path}:3: the validation data have this prompt: {val}:2." in outcome.out
    assert f"hint: {path}:4: the row is nearly {val}:3." in outcome.out
    assert "no chat row can be used" in minigpt("data", "check", path, "--val", write([{}])).err


def test_leaked_exam_questions(write: Any, minigpt: Any) -> None:
    english = "Which of the four small rivers in the far north is the longest one by far?"
    chinese = "请问在北方的四条小河当中哪一条河流最长？"
    questions = (english, chinese, "7 + 5?")
    items = [
        {"id": str(i), "family": "f", "messages": [{"role": "user", "content": q}], "answer": "a"}
        for i, q in enumerate(questions)
    ]
    exam = write(items, "exam.jsonl")
    rows = [
        "He asked: which OF the four small rivers,  in the far north -- is the longest, and left.",
        "有人问在北方的四条小河当中哪一条河流最长，没有人回答。",
        "7 + 5?",
        "Which of the four small rivers in the far south is the longest one by far?",
        "请问在南方的四条小河当中有没有河流最长",
        "Is 7 + 5? the question",
    ]
    path = write([{"text": row} for row in rows])
    outcome = minigpt("data", "check", path, "--exam", exam)
    assert outcome.status == 2
    leaks = [text for text in outcome.out.splitlines() if "[exam]" in text]
    assert [text.split(": ")[1] for text in leaks] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert all(f"({n})" in text for n, text in enumerate(leaks))
    dialogue = write([chat("well", "ok"), chat("７ + 5？", "12")], "chat.jsonl")
    assert (
        f"{dialogue}:2: holds a question" in minigpt("data", "check", dialogue, "--exam", exam).out
    )


def test_what_the_maximum_length_leaves(write: Any, tokenizer_dir: Path, minigpt: Any) -> None:
    long = chat("word " * 60, "yo")
    half = chat("hi", "word " * 60)
    path = write([GOOD, long, half, *(chat(f"q{n}", "a") for n in range(20))])
    options = ("data", "check", path, "--tokenizer", tokenizer_dir, "--max_length")
    outcome = minigpt(*options, 64)
    assert outcome.status == 0
    assert f"hint: {path}:2: no target token is left after cutting to 64." in outcome.out
    assert "[too_long]" in outcome.out
    assert f"hint: {path}: 2 rows are cut to 64." in outcome.out
    assert minigpt(*options, 4096).status == 0
    long_text = write([{"text": "word " * 60}], "text.jsonl")
    clean = minigpt("data", "check", long_text, "--tokenizer", tokenizer_dir, "--max_length", 8)
    assert clean == (0, "1 row checked: 0 errors, 0 hints\n", "")


def test_pairs_that_differ_only_after_the_cut(
    write: Any, tokenizer_dir: Path, minigpt: Any
) -> None:
    path = write([pair("p", "same " * 40 + "good", "same " * 40 + "bad")])
    outcome = minigpt("data", "check", path, "--tokenizer", tokenizer_dir, "--max_length", 64)
    assert "[too_long]" in outcome.out
    assert (
        f"error: {path}:1: no target token is left after cutting to 64: 1 of 1 rows" in outcome.out
    )
    assert outcome.status == 2


def test_the_kind_is_guessed_or_given(write: Any, minigpt: Any) -> None:
    path = write([{"text": "a", "messages": GOOD["messages"]}])
    assert minigpt("data", "check", path).status == 0
    assert minigpt("data", "check", path, "--kind", "text").status == 0
    assert "not a preference row" in minigpt("data", "check", path, "--kind", "preference").out


def test_many_problems_are_counted_and_few_shown(write: Any, tmp_path: Path, minigpt: Any) -> None:
    path, file = write([GOOD, *[{"messages": []}] * 30, GOOD]), tmp_path / "out" / "report.json"
    outcome = minigpt("data", "check", path, "--json", file)
    assert "[no_messages] 30 times: lines 2, 3, 4, 5, 6, ...\n" in outcome.out
    assert outcome.out.count("[no_messages]") == 1
    report = json.loads(file.read_text())
    assert (report["rows"], report["errors"]) == (32, 30)
    assert report["counts"] == {"no_messages": 30, "duplicate": 1}
    locations = [(problem["path"], problem["line"]) for problem in report["problems"]]
    assert locations == [(str(path), line) for line in (*range(2, 22), 32)]
    everything = minigpt("data", "check", path, "--all").out
    assert everything.count("[no_messages]\n") == 30


def test_the_bundled_data_have_no_errors(repo_root: Path, minigpt: Any) -> None:
    paths = sorted((repo_root / "data").glob("*.jsonl"))
    prompts = [file for file in paths if "grpo" in file.name]
    others = [file for file in paths if file not in prompts]
    exams = sorted((repo_root / "data" / "exam").glob("*.jsonl"))
    for files, more in ((others, []), (prompts, ["--kind", "prompt"])):
        outcome = minigpt("data", "check", *files, "--exam", *exams, *more)
        assert (outcome.status, outcome.err) == (0, "")
        assert " 0 errors" in outcome.out


def test_prompts_to_answer(write: Any, tmp_path: Path, minigpt: Any, trained: Path) -> None:
    rows = [
        {"prompt": "1+1=", "answer": "2"},
        {"messages": [{"role": "user", "content": "2+2?"}], "answer": "4"},
        {"prompt": "1+1=", "answer": "2"},
        {"answer": "no prompt"},
        {"prompt": "3+3=", "answer": "6"},
        {"prompt": "a b " * 60, "answer": "7"},
        {"prompt": "What is the capital of Arden?", "answer": "8"},
    ]
    path, val = write(rows), tmp_path / "val.jsonl"
    val.write_text(json.dumps({"prompt": "3+3=", "answer": "5"}) + "\n")
    exam = tmp_path / "exam.jsonl"
    exam.write_text('{"prompt": "What is the capital of Arden?", "answer": "x"}\n')
    more = ("--tokenizer", trained / "tokenizer", "--max_length", 64)
    outcome = minigpt(
        *("data", "check", path, "--kind", "prompt", "--val", val, "--exam", exam), *more
    )
    assert outcome.status == 2
    for line, reason in ((3, "duplicate"), (5, "validation"), (6, "too_long"), (7, "exam")):
        assert re.search(rf"{path}:{line}: .*\[{reason}\]", outcome.out)
    assert re.search(rf"{path}:4: ", outcome.out)
    assert "7 rows checked: 3 errors, 2 hints" in outcome.out


JUNK = st.one_of(
    st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")),
    st.text(max_size=12).map(lambda text: line({"text": text}) if text.isprintable() else b"x"),
    st.text(max_size=12).map(lambda text: json.dumps({"text": text}).encode()),
    st.text(max_size=8).map(lambda text: f'{{"text": "中文{text}"}}'.encode("gb18030", "ignore")),
    st.sampled_from([b'{"text": "a"}', b'{"text": "<|im\\u0000_end|>"}', b"\xef\xbb\xbf", b""]),
)


def test_a_broken_array_cannot_be_mended(tmp_path: Path, minigpt: Any) -> None:
    path, out = tmp_path / "in.json", tmp_path / "out.jsonl"
    path.write_bytes(b'[{"text": "a\xff\x01"}]')  # read from a copy without the last character
    outcome = minigpt("data", "check", path, "--fix", out)
    assert outcome.status == 2
    assert outcome.err.startswith(f"minigpt: {path}:1: byte 13 of the line is neither UTF-8")
    assert not out.exists()


@settings(max_examples=120)
@given(st.lists(JUNK, min_size=1, max_size=8))
@example([b"\x1f\x8b\x00"])
@example([b"\x01[\xff"])
@example([b"", b'["a",'])
@example([b"\xd0\xcf\x11\xe0"])
@example([b"PAR1"])
@example([b"ARROW1"])
@example([b"\xff\xff\xff\xff"])
@example([b"\0"])
@example([b"\0a\0b\0c\0d\0e"])
def test_whatever_the_file_its_mended_copy_has_no_errors(rows: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path, out = Path(directory, "in.jsonl"), Path(directory, "out.jsonl")
        path.write_bytes(b"\n".join([*rows, b'{"text": "good"}']))

        def check(file: Path) -> tuple[Checker, Findings]:
            findings = Findings()
            checker = Checker(findings, kind="text")
            checker.check(file)
            checker.finish()
            return checker, findings

        checker, findings = check(path)
        try:
            written = checker.write_fixed(path, out)
        except DataError as error:
            message = str(error)
        else:
            message = ""
        if message:
            assert message.startswith(str(path))
            assert findings.errors()
            assert not out.exists()
            data = b"\n".join(rows)
            text = data.removeprefix(b"\xef\xbb\xbf").translate(None, CONTROL_BYTES)
            broken_array = text.lstrip().startswith(b"[")
            foreign = data.startswith((b"\x1f\x8b", b"(\xb5/\xfd", *SIGNATURES))
            binary = len(re.findall(b"\0+", data)) > FEW_NULS
            assert broken_array or foreign or binary  # or compressed
            return
        again, left = check(out)
        assert left.errors() == 0, list(left.lines())
        assert set(left.counts) <= {"replacement_character"}
        assert again.rows == written


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from minigpt.__main__ import main; code = main(['data', 'check', '--help']);"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules);"
        "sys.exit(f'{heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "minigpt data check raw.jsonl --fix clean.jsonl" in done.stdout


def test_different_problems_of_a_kind_are_shown_up_to_a_limit(write: Any, minigpt: Any) -> None:
    names = [chr(ord("a") + number) * 3 for number in range(25)]
    path = write([GOOD, *({name: 1} for name in names)])
    outcome = minigpt("data", "check", path)
    assert outcome.out.count("not a chat row") == 20
    assert f"{path}: 5 more [missing_key]; --all shows them" in outcome.out
    assert minigpt("data", "check", path, "--all").out.count("not a chat row") == 25


def test_labels_and_prompts_of_unpaired_rows(write: Any, tmp_path: Path, minigpt: Any) -> None:
    rows = [{"prompt": f"p{n}", "completion": f"c{n}\x07", "label": n != 1} for n in range(3)]
    fixed = tmp_path / "fixed.jsonl"
    outcome = minigpt("data", "check", write(rows), "--fix", fixed)
    assert outcome.status == 0
    assert "[one_label]" not in outcome.out
    mended = [json.loads(text) for text in fixed.read_text().splitlines()]
    assert [(row["completion"], row["label"]) for row in mended] == [
        ("c0", True),
        ("c1", False),
        ("c2", True),
    ]
    outcome = minigpt("data", "check", write([{**row, "label": 0} for row in rows]))
    assert outcome.status == 0
    assert "hint: " in outcome.out
    assert "all completions are undesirable. KTO learns from both kinds" in outcome.out
    outcome = minigpt("data", "check", write([{**row, "prompt": "p"} for row in rows]))
    assert outcome.status == 2
    assert "all rows have one prompt. KTO compares each completion" in outcome.out
    outcome = minigpt("data", "check", write([*rows, {**rows[0], "label": "good"}]))
    assert "must be true or false, not 'good'. It says whether" in outcome.out
