"""Contact sheets: many pictures on one page, with captions and scores."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_PAPER = (250, 249, 246)
_INK = (34, 34, 38)
_FAINT = (122, 120, 116)
_RULE = (222, 218, 210)
_GOLD = (176, 126, 38)

_TITLE_POINTS, _SUBTITLE_POINTS, _CAPTION_POINTS, _NOTE_POINTS = 34, 17, 16, 14
_LEADING = 1.4
_CAPTION_LINES = _NOTE_LINES = 2


@dataclass(frozen=True)
class SheetItem:
    """A picture with what is written under it. `badge` is a word or number over its corner."""

    image: Image.Image
    caption: str = ""
    note: str = ""
    badge: str = ""
    highlighted: bool = False


def contact_sheet(
    items: Sequence[SheetItem],
    *,
    title: str,
    subtitle: str = "",
    columns: int = 4,
    cell_pixels: int = 256,
) -> Image.Image:
    """Lay pictures out in rows under a title; each is fitted into a square cell."""
    columns = max(1, min(columns, len(items) or 1))
    margin, gap = cell_pixels // 5 + 12, max(16, cell_pixels // 8)
    header = _header_height(subtitle)
    text_height = _text_height(items)
    row_height = cell_pixels + text_height + gap
    rows = -(-len(items) // columns)
    size = (
        2 * margin + columns * cell_pixels + (columns - 1) * gap,
        2 * margin + header + rows * row_height - (gap if rows else 0),
    )
    page = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(page)
    _draw_header(draw, margin, size[0], header, title, subtitle)
    for index, item in enumerate(items):
        left = margin + (index % columns) * (cell_pixels + gap)
        top = margin + header + (index // columns) * row_height
        _draw_item(page, draw, item, left, top, cell_pixels)
    return page


def _font(points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(points)


def _line(points: int) -> int:
    return round(points * _LEADING)


def _header_height(subtitle: str) -> int:
    return _line(_TITLE_POINTS) + (_line(_SUBTITLE_POINTS) + 4 if subtitle else 0) + 30


def _text_height(items: Sequence[SheetItem]) -> int:
    captions = _CAPTION_LINES * _line(_CAPTION_POINTS) if any(i.caption for i in items) else 0
    notes = _NOTE_LINES * _line(_NOTE_POINTS) if any(item.note for item in items) else 0
    return captions + notes + (10 if captions or notes else 0)


def _draw_header(
    draw: ImageDraw.ImageDraw, margin: int, width: int, height: int, title: str, subtitle: str
) -> None:
    room = width - 2 * margin
    draw.text(
        (margin, margin), _fit(draw, title, _TITLE_POINTS, room), _INK, font=_font(_TITLE_POINTS)
    )
    if subtitle:
        draw.text(
            (margin, margin + _line(_TITLE_POINTS) + 4),
            _fit(draw, subtitle, _SUBTITLE_POINTS, room),
            _FAINT,
            font=_font(_SUBTITLE_POINTS),
        )
    rule = margin + height - 22
    draw.line((margin, rule, width - margin, rule), fill=_RULE, width=2)


def _draw_item(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    item: SheetItem,
    left: int,
    top: int,
    cell: int,
) -> None:
    picture = _fitted(item.image, cell)
    x, y = left + (cell - picture.width) // 2, top + (cell - picture.height) // 2
    page.paste(picture, (x, y))
    draw.rectangle(
        (x - 1, y - 1, x + picture.width, y + picture.height),
        outline=_GOLD if item.highlighted else _RULE,
    )
    if item.highlighted:
        draw.rectangle((x - 4, y - 4, x + picture.width + 3, y + picture.height + 3), outline=_GOLD)
    if item.badge:
        _draw_badge(draw, item, x, y)
    y = top + cell + 10
    for line in _wrap(draw, item.caption, _CAPTION_POINTS, cell, _CAPTION_LINES):
        draw.text((left, y), line, _INK, font=_font(_CAPTION_POINTS))
        y += _line(_CAPTION_POINTS)
    for line in _wrap(draw, item.note, _NOTE_POINTS, cell, _NOTE_LINES):
        draw.text((left, y), line, _FAINT, font=_font(_NOTE_POINTS))
        y += _line(_NOTE_POINTS)


def _draw_badge(draw: ImageDraw.ImageDraw, item: SheetItem, x: int, y: int) -> None:
    font = _font(_CAPTION_POINTS)
    width = draw.textlength(item.badge, font=font)
    box = (x + 8, y + 8, x + 24 + width, y + 8 + _line(_CAPTION_POINTS) + 4)
    draw.rounded_rectangle(box, radius=6, fill=_GOLD if item.highlighted else _INK)
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    draw.text(middle, item.badge, _PAPER, font=font, anchor="mm")


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    rgb = image.convert("RGB")
    scale = cell / max(rgb.size)
    size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
    return rgb.resize(size, Image.Resampling.LANCZOS)


def _fit(draw: ImageDraw.ImageDraw, text: str, points: int, room: int) -> str:
    """One line of a text, shortened to the room there is."""
    text = " ".join(text.split())
    font = _font(points)
    if draw.textlength(text, font=font) <= room:
        return text
    while text and draw.textlength(f"{text}…", font=font) > room:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _wrap(draw: ImageDraw.ImageDraw, text: str, points: int, room: int, most: int) -> list[str]:
    """A text in at most so many lines."""
    font = _font(points)
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < most:
        if len(lines) == most - 1:
            lines.append(_fit(draw, " ".join(words), points, room))
            break
        taken = 1
        while (
            taken < len(words) and draw.textlength(" ".join(words[: taken + 1]), font=font) <= room
        ):
            taken += 1
        lines.append(_fit(draw, " ".join(words[:taken]), points, room))
        words = words[taken:]
    return lines
