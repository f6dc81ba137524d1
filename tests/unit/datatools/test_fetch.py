"""Corpora come from a stub of their hosts on this machine, with the real clients."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from patience import limit

from minigpt import files
from minigpt.datatools import fetch
from minigpt.errors import ConfigError
from minigpt.reading import limited_time

CHATS = [
    {
        "conversations": [
            {"role": "user", "content": f"问{n}"},
            {"role": "assistant", "content": f"答{n}"},
        ]
    }
    for n in range(400)
]
MEDICAL = "/datasets/gongjy/minimind_dataset/resolve/master/lora_medical.jsonl"
TANG = "/chinese-poetry/chinese-poetry/master/全唐诗/poet.tang.{}.json"


def jsonl(rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(autouse=True)
def _hosts(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MODELSCOPE", stub.url)
    monkeypatch.setattr(fetch, "GITHUB", stub.url)


def test_the_hub_through_its_own_client(stub: Any, tmp_path: Path) -> None:
    name = "TinyStoriesV2-GPT4-valid.txt"
    story = "Once upon a time.\n\nThe end.\n<|endoftext|>\n"
    content = (story + "Ünïcödé\n<|endoftext|>\n\n<|endoftext|>\nLast one").encode()
    for revision in ("main", "c" * 40):
        stub.files[f"/datasets/roneneldan/TinyStories/resolve/{revision}/{name}"] = content
    stub.breaks = 1
    # A process of its own, because the client reads these when it is imported.
    environment = {**os.environ, "HF_ENDPOINT": stub.url, "HF_HUB_OFFLINE": "0"}
    environment["HF_TOKEN"] = "hf_secret"
    code = "from minigpt.__main__ import main; import sys; sys.exit(main({}) * 10 + main({}))"
    arguments = ("data", "fetch", "--output_dir", str(tmp_path))
    good, bad = (*arguments, "tinystories-val"), (*arguments, "minimind-dpo", "--file", "no.jsonl")
    command = [sys.executable, "-c", code.format(list(bad), list(good))]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=limit(120)
    )
    assert done.returncode == 20, done.stderr
    assert not stub.secrets  # a mirror learns nothing of its user
    assert "minigpt: Cannot fetch no.jsonl of jingyaogong/minimind_dataset: http" in done.stderr
    assert "listed at https://huggingface.co/datasets/jingyaogong/minimind_dataset." in done.stderr
    assert done.stdout.index("CDLA-Sharing-1.0") < done.stdout.index("3 rows; left out: 1 empty")
    texts = [row["text"] for row in rows_of(tmp_path / "tinystories-val.jsonl")]
    assert texts == ["Once upon a time.\n\nThe end.", "Ünïcödé", "Last one"]
    source = json.loads((tmp_path / "tinystories-val.source.json").read_text())
    assert source["licence"] == "CDLA-Sharing-1.0"
    assert source["page"] == "https://huggingface.co/datasets/roneneldan/TinyStories"
    assert source["files"][name]["revision"] == "c" * 40
    assert source["files"][name]["sha256"] == hashlib.sha256(content).hexdigest()
    assert {path.name for path in tmp_path.iterdir()} == {
        *("tinystories-val.jsonl", "tinystories-val.source.json", ".downloads"),
    }


def test_what_broke_off_goes_on_where_it_stopped(stub: Any, tmp_path: Path, minigpt: Any) -> None:
    stub.files[MEDICAL] = content = jsonl(CHATS)
    stub.breaks = 1
    options = ("data", "fetch", "minimind-medical", "--source", "modelscope")
    broken = minigpt(*options, "--output_dir", tmp_path)
    assert broken.status == 2
    assert "Run the command again to go on" in broken.err
    done = minigpt(*options, "--output_dir", tmp_path)
    assert (done.status, done.err) == (0, "")
    assert [wanted for *_, wanted in stub.asked] == [None, f"bytes={len(content) // 2}-"]
    assert rows_of(tmp_path / "minimind-medical.jsonl") == CHATS
    again = minigpt(*options, "--output_dir", tmp_path)
    assert "exists already" in again.err


def test_what_came_whole_but_was_not_renamed_does_not_stop_reruns(
    stub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.files[MEDICAL] = content = jsonl(CHATS)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fetch.fetch("minimind-medical", tmp_path, modelscope=True)
    path, rows, _ = fetch.fetch("minimind-medical", tmp_path, modelscope=True)
    assert (rows, rows_of(path)) == (400, CHATS)
    assert [wanted for *_, wanted in stub.asked] == [None, f"bytes={len(content)}-", None]


def test_another_version_is_not_joined_to_the_first_half(stub: Any, tmp_path: Path) -> None:
    stub.files[MEDICAL] = jsonl(CHATS)
    stub.breaks = 1
    with pytest.raises(fetch.ConfigError, match="broke"):
        fetch.fetch("minimind-medical", tmp_path, modelscope=True)
    stub.files[MEDICAL] = jsonl(CHATS[::-1])
    path, rows, _ = fetch.fetch("minimind-medical", tmp_path, modelscope=True)
    assert (rows, rows_of(path)) == (400, CHATS[::-1])


def test_a_full_disk_costs_no_download(
    stub: Any, tmp_path: Path, minigpt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.files[MEDICAL] = jsonl(CHATS)
    command = ("data", "fetch", "minimind-medical", "--source", "modelscope")

    def refuse(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", refuse)
        full = minigpt(*command, "--output_dir", tmp_path)
    tiny_runs.assert_refused(full, f"Cannot write to {tmp_path}", "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == [".downloads"]
    assert minigpt(*command, "--output_dir", tmp_path).status == 0
    assert len(stub.asked) == 1
    assert rows_of(tmp_path / "minimind-medical.jsonl") == CHATS


def test_a_wrong_checksum_is_refused(stub: Any, tmp_path: Path, minigpt: Any) -> None:
    stub.files[MEDICAL] = jsonl(CHATS)
    stub.etags[MEDICAL] = f'"{"0" * 64}"'
    options = ("data", "fetch", "minimind-medical", "--source", "modelscope")
    outcome = minigpt(*options, "--output_dir", tmp_path)
    assert outcome.status == 2
    assert "the host says 0000" in outcome.err
    assert not list(tmp_path.rglob("*medical*.jsonl"))
    del stub.etags[MEDICAL]
    assert minigpt(*options, "--output_dir", tmp_path).status == 0


def test_poems_of_several_files_up_to_a_limit(stub: Any, tmp_path: Path, minigpt: Any) -> None:
    def poem(number: int) -> dict[str, object]:
        return {
            "author": "王維",
            "title": f"詩{number}",
            "paragraphs": ["空山不見人，", "但聞人語響。"],
        }

    for part in range(3):
        name = TANG.format(part * 1000)
        stub.files[name] = json.dumps([poem(part), {"paragraphs": None}], indent=1).encode()
        stub.etags[name] = 'W/"weak"'
    options = ("data", "fetch", "tang-poems", "--output_dir", tmp_path, "--limit", 2)
    outcome = minigpt(*options)
    assert (outcome.status, outcome.err) == (0, "")
    assert "MIT; the poems are in the public domain" in outcome.out
    assert outcome.out.endswith("tang-poems.jsonl: 2 rows; left out: 1 empty\n")
    rows = rows_of(tmp_path / "tang-poems.jsonl")
    assert rows[1]["text"] == "詩1\n王維\n空山不見人，\n但聞人語響。"
    assert len(stub.asked) == 2


def test_other_forms_become_ours(stub: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(
        jsonl(
            [
                {"text": "<|im_start|>一<|im_end|> <|im_start|>二<|im_end|>"},
                {"text": "<s>三</s> <s>四</s>"},
            ]
        )
    )
    marked = fetch.CORPORA["minimind-pretrain"].convert(path)
    assert [row["text"] for row in marked] == ["一\n二", "三\n四"]
    path.write_bytes(jsonl([{"instruction": "问", "output": "答", "extra": 1}]))
    medical = fetch.CORPORA["medical-zh"].convert(path)
    assert list(medical) == [{"instruction": "问", "input": "", "output": "答"}]
    path.write_bytes(jsonl([{"rhythmic": "如梦令", "author": "李清照", "paragraphs": ["常记"]}]))
    poems = fetch.CORPORA["song-ci"].convert(path)
    assert list(poems) == [{"text": "如梦令\n李清照\n常记"}]


def test_a_form_that_changed_is_refused(stub: Any, tmp_path: Path, minigpt: Any) -> None:
    stub.files[MEDICAL] = jsonl([{"question": "a"}])
    options = ("data", "fetch", "minimind-medical", "--source", "modelscope")
    outcome = minigpt(*options, "--output_dir", tmp_path)
    assert outcome.status == 2
    assert "can be used: {'missing_key': 1}" in outcome.err
    assert not list(tmp_path.glob("*.jsonl"))


def test_the_list_and_wrong_names(tmp_path: Path, minigpt: Any) -> None:
    listed = minigpt("data", "fetch")
    assert listed.status == 0
    for name, corpus in fetch.CORPORA.items():
        assert name in listed.out
        assert corpus.repository.licence in listed.out
    assert "No corpus 'x'. Known are minimind-pretrain" in minigpt("data", "fetch", "x").err
    options = ("data", "fetch", "tang-poems", "--source", "modelscope", "--output_dir", tmp_path)
    assert "not on ModelScope" in minigpt(*options).err


@pytest.mark.parametrize("text", ["x" + " " * 200_000 + "y", "<s> " * 50_000 + "x" + " " * 200_000])
def test_cleaning_takes_time_in_proportion_to_the_text(tmp_path: Path, text: str) -> None:
    """A pattern that looks at each of 200,000 spaces for a mark behind it takes an hour."""
    (tmp_path / "rows").write_bytes(jsonl([{"text": text}]))
    with limited_time(limit(20)):
        (row,) = fetch._marked(tmp_path / "rows")
    assert row["text"] == text.replace("<s>", "").strip()


def test_marks_become_line_ends(tmp_path: Path) -> None:
    text = " <s> a b\n<|im_end|>\n<|im_start|> c</s>\n\n d  e <|endoftext|> "
    (tmp_path / "rows").write_bytes(jsonl([{"text": text}]))
    assert list(fetch._marked(tmp_path / "rows")) == [{"text": "a b\nc\nd  e"}]


def test_a_story_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "LARGEST_ROW", 1000)
    (tmp_path / "stories").write_text("once more\n" * 200)
    with pytest.raises(fetch.DataError, match="a document of more than 1,000 bytes"):
        list(fetch._stories(tmp_path / "stories"))


def test_a_second_process_is_refused(stub: Any, tmp_path: Path) -> None:
    stub.files[MEDICAL] = jsonl(CHATS)
    out = tmp_path / "minimind-medical.jsonl"
    with files.atomic_file(out, exclusive=True) as partial:
        with pytest.raises(ConfigError, match=f"Another process is writing {out}"):
            fetch.fetch("minimind-medical", tmp_path, modelscope=True)
        partial.touch()
    assert not (tmp_path / ".downloads").exists()
