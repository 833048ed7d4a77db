"""Draws the two sample pages, and writes the lines of each page to a text file beside it.

    python examples/pages/make_pages.py [FOLDER]

Needs Pillow, and the Noto Sans CJK fonts (Debian: fonts-noto-cjk).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_FONTS = Path("/usr/share/fonts/opentype/noto")
_SIMPLIFIED_CHINESE = 2
"""The index of the collection's font with mainland China's forms of Han characters."""

_SIZE = (1240, 1000)
_INK = (34, 38, 46)
_FAINT = (96, 104, 118)
_ACCENT = (22, 82, 150)
_RULE = (200, 206, 216)


@dataclass(frozen=True)
class Text:
    """A line of a page: its top left corner (pixels), text, height (pixels), colour and weight."""

    x: int
    y: int
    text: str
    size: int = 26
    colour: tuple[int, int, int] = _INK
    bold: bool = False


INVOICE = (
    Text(80, 60, "INVOICE 发票", 46, _ACCENT, bold=True),
    Text(820, 72, "No. INV-2024-0817", 28, bold=True),
    Text(80, 150, "Harbour Optics Ltd. 港湾光学有限公司", 28),
    Text(80, 200, "18 Lighthouse Road, Qingdao 266071", 26, _FAINT),
    Text(820, 200, "Date: 2024-03-15", 26, _FAINT),
    Text(80, 290, "Goods 商品名称", 26, _ACCENT, bold=True),
    Text(700, 290, "Quantity", 26, _ACCENT, bold=True),
    Text(960, 290, "Amount", 26, _ACCENT, bold=True),
    Text(80, 360, "Survey telescope, 80 mm 测量望远镜", 26),
    Text(700, 360, "12", 26),
    Text(960, 360, "4,680.00", 26),
    Text(80, 420, "Aluminium tripod 铝合金三脚架", 26),
    Text(700, 420, "25", 26),
    Text(960, 420, "1,975.00", 26),
    Text(80, 480, "Lens cleaning kit 镜头清洁套装", 26),
    Text(700, 480, "60", 26),
    Text(960, 480, "540.00", 26),
    Text(80, 540, "Delivery to Shanghai 运费", 26),
    Text(700, 540, "18", 26),
    Text(960, 540, "320.00", 26),
    Text(700, 640, "Subtotal", 26),
    Text(960, 640, "7,515.00", 26),
    Text(700, 695, "VAT 13%", 26),
    Text(960, 695, "976.95", 26),
    Text(700, 760, "Total 合计", 32, bold=True),
    Text(960, 760, "8,491.95", 32, bold=True),
    Text(80, 860, "Payment within 30 days. 请于三十天内付款。", 26),
    Text(80, 915, "Thank you for your business!", 24, _FAINT),
)

NOTICE = (
    Text(430, 60, "图书馆开放通知", 52, _ACCENT, bold=True),
    Text(410, 135, "Library Opening Notice", 38, _ACCENT),
    Text(90, 235, "各位读者：", 30),
    Text(90, 290, "自九月一日起，本馆每天上午八点开门，晚上十点闭馆。", 30),
    Text(90, 345, "阅览室共有六百个座位，请提前一天在网上预约。", 30),
    Text(90, 400, "每人最多可以借阅十本图书，借期三十天。", 30),
    Text(90, 455, "馆内请保持安静，不要饮食，手机请调成静音。", 30),
    Text(90, 510, "如需帮助，请联系一楼服务台，电话：6518-2046。", 30),
    Text(90, 600, "Dear readers,", 28),
    Text(90, 650, "From 1 September the library opens daily from 8 am to 10 pm.", 28),
    Text(90, 700, "There are 600 seats; please book yours online one day ahead.", 28),
    Text(90, 750, "You may borrow up to ten books for thirty days.", 28),
    Text(90, 800, "Please keep quiet, and leave food and drinks outside.", 28),
    Text(90, 850, "For help, ask at the service desk on the ground floor.", 28),
    Text(820, 920, "City Library 市图书馆", 28, _FAINT),
)


def _font(size: int, *, bold: bool) -> ImageFont.FreeTypeFont:
    name = "NotoSansCJK-Bold.ttc" if bold else "NotoSansCJK-Regular.ttc"
    return ImageFont.truetype(_FONTS / name, size, index=_SIMPLIFIED_CHINESE)


def draw(lines: tuple[Text, ...], rules: tuple[int, ...]) -> Image.Image:
    """A page with `lines` on it, and horizontal rules at the heights `rules` (pixels)."""
    page = Image.new("RGB", _SIZE, (252, 252, 250))
    pen = ImageDraw.Draw(page)
    for y in rules:
        pen.line((80, y, _SIZE[0] - 80, y), fill=_RULE, width=2)
    for line in lines:
        pen.text((line.x, line.y), line.text, font=_font(line.size, bold=line.bold), fill=line.colour)
    return page


def main(folder: Path) -> None:
    pages = {"invoice": (INVOICE, (260, 340, 610, 825)), "notice": (NOTICE, (210, 580))}
    for name, (lines, rules) in pages.items():
        page = draw(lines, rules).quantize(64, dither=Image.Dither.NONE)
        page.save(folder / f"{name}.png", optimize=True)
        text = "".join(f"{line.text}\n" for line in lines)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
