"""Bytes of data files that are not plain UTF-8 become it, so that all readers read one text.

A file is UTF-8, UTF-16 or UTF-32, or GB18030, of which GBK and GB2312 are parts:

- UTF-16 and UTF-32 are recognised by their byte order mark, or by how JSON begins in them.
- A line that is not UTF-8 is GB18030 if the lines of its file that are not UTF-8 read as Chinese in
  it: at least 15% of their letters (of few letters, half) are among the commonest characters,
  simplified or traditional. A line that is nearly UTF-8 is damaged, and stays what it is.
- Some short lines are both, such as 联通. They are GB18030 where most lines of the file are.

Byte order marks at the beginning of lines are left out, as are control characters, which JSON
forbids: they come from files that were joined, cut off by a crash (NUL) or made by DOS (Ctrl-Z).
"""

from __future__ import annotations

import codecs
import re

from minigpt.errors import DataError

# What was changed so that a file could be read, by reason and in words: how many lines, 0 for the
# whole file, and the first of them.
Notes = dict[tuple[str, str], list[int]]

CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\n\r"))  # JSON allows DEL
# Terminals and editors write the others: backspace, form feed, Ctrl-Z, escape and the like.
_NOT_IN_TEXT = CONTROL_BYTES.translate(None, b"\b\v\f\x1a\x1b")
COMMON_SHARE = 0.15  # of letters, by which text is Chinese; other encodings give up to a tenth
BINARY_SHARE = 0.1  # of runs of NUL bytes among all bytes; a crash may leave some long ones
FEW_NULS = 3  # such runs, which a short file may have all the same
_WIDE = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    b"{\0": "utf-16-le",
    b"[\0": "utf-16-le",
    b"\0{": "utf-16-be",
    b"\0[": "utf-16-be",
}
_LONG_SEQUENCE = re.compile(rb"[\xe0-\xff]")  # begins three bytes or more of UTF-8
_UTF8_SEQUENCES = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)
_NULS = re.compile(rb"\0+")
_NOT_ASCII = re.compile(rb"[\x80-\xff]")
_COMMON = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年"
    "过发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心"
    "她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间"
    "由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给"
    "世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女变"
    "四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社"
    "便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北"
    "边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运吗呢吧您谁哪什怎答您好谢请帮春"
    "夏秋冬花风云雨雪江河湖城夜酒诗君归思远近红绿青黄黑古往春眠晓啼鸟处"
    "這個們來為國說時會對過發後裡還進樣開從實無與長機關點業將兩間戰應頭體見產話給門動經麼當學現"
    "沒東聲員論處義幾認條氣題爾別變總電報結務場計資許統區隊決馬書聽達強難權設記類據邊張該規萬覺"
    "術領確傳師觀讓識帶導爭運嗎誰請幫謝風雲詩歸遠紅綠黃鳥曉"
)


class Mender:
    """Makes the blocks of one file readable.

    Args:
        notes: gets what was changed, with lines.

    Attributes:
        is_needed: whether all further blocks must pass through it, also those that are UTF-8.
    """

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.is_needed = False
        self._wide: codecs.IncrementalDecoder | None = None
        self._chinese = 0.0  # share of GB18030 among the lines that are not ASCII

    def mend(self, block: bytes, line: int, begins_line: bool) -> bytes:
        """Return a block as UTF-8; bytes in no known encoding stay as they are.

        Args:
            block: ends with a whole character, unless the file is UTF-16 or UTF-32.
            line: its first line's number in the file, from 1.
            begins_line: whether it does not go on with a line that began before it.

        Raises:
            DataError: when the file is no text.
        """
        if line == 1 and begins_line:
            self._look_at_beginning(block)
        if self._wide:
            block = self._wide.decode(block).encode("utf-8", "surrogatepass")
            self._note("encoding", f"read as {self._encoding}", line, 0)
        elif not (self._chinese or is_utf8(block)):
            self._chinese = chinese_share(block.split(b"\n"))
            self.is_needed = self._chinese > 0
        lines = enumerate(block.split(b"\n"), line)
        return b"\n".join(
            [self._line(data, number, begins_line or number > line) for number, data in lines]
        )

    def _look_at_beginning(self, block: bytes) -> None:
        for mark, encoding in _WIDE.items():
            if block.startswith(mark):
                self._wide = codecs.getincrementaldecoder(encoding)("surrogatepass")
                self._encoding = encoding[:6].upper()
                self.is_needed = True
                return
        if len(_NULS.findall(block)) > max(FEW_NULS, BINARY_SHARE * len(block)):
            problem = "the file is binary, or UTF-16 without its byte order mark"
            remedy = "Give the text in it as JSONL, CSV or plain text in UTF-8."
            raise DataError(problem, remedy=remedy, reason="foreign")

    def _line(self, data: bytes, number: int, is_whole: bool) -> bytes:
        if self._chinese and not data.isascii() and (text := self._as_chinese(data)) is not None:
            data = text.encode()
            self._note("encoding", "read as GB18030", number)
        if is_whole and data.startswith(codecs.BOM_UTF8):
            while data.startswith(codecs.BOM_UTF8):
                data = data.removeprefix(codecs.BOM_UTF8)
            self._note("bom", "byte order marks left out", number)
        plain = data.translate(None, CONTROL_BYTES)
        if len(plain) < len(data):
            self._note("control_character", "control characters left out", number)
        return plain

    def _note(self, reason: str, change: str, line: int, lines: int = 1) -> None:
        self.notes.setdefault((reason, change), [0, line])[0] += lines

    def _as_chinese(self, data: bytes) -> str | None:
        if not is_utf8(data):
            return gb18030(data)
        if self._chinese > 0.5 and not _LONG_SEQUENCE.search(data):
            return _decoded(data)
        return None


def is_binary(beginning: bytes) -> bool:
    """Whether a file begins with what is in no text, neither in UTF-8 or GB18030 nor in UTF-16."""
    is_wide = beginning.startswith(tuple(_WIDE))
    return not is_wide and len(beginning.translate(None, _NOT_IN_TEXT)) < len(beginning)


def is_utf8(data: bytes) -> bool:
    """Whether bytes are UTF-8."""
    try:
        return data.isascii() or bool(data.decode())
    except UnicodeDecodeError:
        return False


def chinese_share(lines: list[bytes]) -> float:
    """Return which share of the lines that are not ASCII is GB18030: 0 if they are not Chinese."""
    lines = [line for line in lines if not line.isascii()]
    others = [line for line in lines if not is_utf8(line)]
    texts = [text for line in others if (text := gb18030(line)) is not None]
    letters = [letter for text in texts for letter in text if not letter.isascii()]
    letters = [letter for letter in letters if letter.isalpha() or letter >= "\ue000"]
    common = sum(letter in _COMMON for letter in letters)
    needed = max(COMMON_SHARE * len(letters), min(len(letters), 6) / 2)
    is_chinese = 0 < needed <= common
    return len(texts) / len(lines) if is_chinese else 0.0


def gb18030(data: bytes) -> str | None:
    """Decode a line that is not UTF-8 as GB18030; None if it is not that, but damaged UTF-8."""
    sequences = sum(map(len, _UTF8_SEQUENCES.findall(data)))
    if 2 * sequences > len(_NOT_ASCII.findall(data)):
        return None
    return _decoded(data)


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("gb18030")
    except UnicodeDecodeError:
        return None
