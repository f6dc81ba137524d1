"""A second, small domain for an adapter: everyday computer safety."""

from __future__ import annotations

from sample_world.common import Row, chat, cycle, stream

# The matter and the advice, in English and in Chinese.
_ADVICE = (
    (
        "an attachment from a stranger",
        "Leave it closed and delete the message.",
        "陌生人发来的附件",
        "不要打开，直接删除邮件。",
    ),
    (
        "a lost phone",
        "Lock it from another device at once.",
        "手机丢失",
        "马上用另一台设备把它锁定。",
    ),
    (
        "a weak password",
        "Replace it with a long phrase of four random words.",
        "弱密码",
        "换成由四个随机词组成的长口令。",
    ),
    (
        "a public wireless network",
        "Use it only for sites with an encrypted connection.",
        "公共无线网络",
        "只访问加密连接的网站。",
    ),
    ("an old computer", "Wipe the disk before you give it away.", "旧电脑", "送人之前先清空硬盘。"),
    (
        "a strange login alert",
        "Change the password and sign out everywhere.",
        "异常登录提醒",
        "修改密码并退出所有设备。",
    ),
    (
        "a caller who wants a code",
        "Hang up and never read the code aloud.",
        "来电索要验证码",
        "挂断电话，绝不念出验证码。",
    ),
    (
        "missing backups",
        "Copy the files to a second disk every week.",
        "没有备份",
        "每周把文件复制到第二块硬盘。",
    ),
    ("a pending update", "Install it today and restart.", "等待安装的更新", "今天就安装并重启。"),
    (
        "an unknown USB stick",
        "Hand it in and do not plug it in.",
        "来历不明的优盘",
        "交给管理员，不要插上电脑。",
    ),
    (
        "a shared account",
        "Give every person an account of their own.",
        "多人共用的账号",
        "给每个人单独开一个账号。",
    ),
    (
        "an app that asks for contacts",
        "Refuse, unless the app cannot work without them.",
        "索要通讯录的应用",
        "除非必须，否则拒绝授权。",
    ),
    (
        "a link in a short message",
        "Type the address yourself instead of tapping it.",
        "短信里的链接",
        "自己输入网址，不要直接点开。",
    ),
    (
        "an unlocked screen",
        "Set it to lock after two minutes.",
        "没有锁定的屏幕",
        "设置为两分钟后自动锁定。",
    ),
    (
        "a leaked email address",
        "Turn on two-step sign-in for it.",
        "泄露的邮箱地址",
        "为它开启两步验证。",
    ),
    ("a home router", "Change the password that it came with.", "家用路由器", "改掉出厂时的密码。"),
)
_ASK: dict[str, tuple[str, ...]] = {
    "en": (
        "What should I do about {m}?",
        "How do I handle {m}?",
        "Please advise me on {m}.",
        "I worry about {m}. What is safe?",
    ),
    "zh": (
        "遇到{m}怎么办？",
        "怎样处理{m}的问题？",
        "{m}，请给点建议。",
        "我担心{m}，怎样才安全？",
    ),
}
_ASK_VAL: dict[str, tuple[str, ...]] = {
    "en": ("What is the safe way to deal with {m}?",),
    "zh": ("面对{m}，安全的做法是什么？",),
}


def _rows(seed: int, ask: dict[str, tuple[str, ...]]) -> list[Row]:
    rows: list[Row] = []
    for en, en_advice, zh, zh_advice in _ADVICE:
        rows.extend(chat(template.format(m=en), en_advice) for template in ask["en"])
        rows.extend(chat(template.format(m=zh), zh_advice) for template in ask["zh"])
    return cycle(stream(seed, "security rows"), rows, len(rows))


def security_rows(seed: int) -> list[Row]:
    """Return the training chats."""
    return _rows(seed, _ASK)


def security_val_rows(seed: int) -> list[Row]:
    """Return the same matters in a wording of their own."""
    return _rows(seed, _ASK_VAL)
