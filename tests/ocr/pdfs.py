"""Writes small PDFs object by object."""

from __future__ import annotations

from pathlib import Path

HELVETICA = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"


def stream(content: bytes, entries: str = "") -> bytes:
    return b"<< /Length %d %b >>\nstream\n%b\nendstream" % (len(content), entries.encode(), content)


def write_pdf(
    path: Path, objects: dict[int, str | bytes], trailer: str = "", *, with_table: bool = False
) -> Path:
    """A PDF of these objects; its catalog is number 1.

    PDFium finds them without a table of their places, for which they must be numbered from 1.
    """
    data, places = b"%PDF-1.7\n", []
    for number, body in objects.items():
        places.append(len(data))
        data += b"%d 0 obj\n%b\nendobj\n" % (number, body.encode() if isinstance(body, str) else body)
    start = len(data)
    if with_table:
        data += b"xref\n0 %d\n0000000000 65535 f \n" % (len(places) + 1)
        data += b"".join(b"%010d 00000 n \n" % place for place in places)
    data += f"trailer\n<< /Root 1 0 R /Size {max(objects) + 1} {trailer} >>\n".encode()
    path.write_bytes(data + (b"startxref\n%d\n" % start if with_table else b"") + b"%%EOF\n")
    return path


def one_page(
    path: Path,
    content: bytes = b"",
    *,
    page: str = "/MediaBox [0 0 612 792]",
    resources: str = "/Font << /F 5 0 R >>",
    catalog: str = "",
    more: dict[int, str | bytes] | None = None,
    trailer: str = "",
) -> Path:
    """A PDF of one page. `page` and `catalog` are further entries of their dictionaries; 5 is Helvetica."""
    objects: dict[int, str | bytes] = {
        1: f"<< /Type /Catalog /Pages 2 0 R {catalog} >>",
        2: "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        3: f"<< /Type /Page /Parent 2 0 R {page} /Resources << {resources} >> /Contents 4 0 R >>",
        4: stream(content),
        5: HELVETICA,
        **(more or {}),
    }
    return write_pdf(path, objects, trailer)


def three_pages(path: Path, kids: str, content: bytes) -> Path:
    """A PDF of three pages: `kids` names them, 3 and 4 are pages with this content."""
    page = (
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 100] /Contents 6 0 R "
        "/Resources << /Font << /F 5 0 R >> >> >>"
    )
    return write_pdf(
        path,
        {
            1: "<< /Type /Catalog /Pages 2 0 R >>",
            2: f"<< /Type /Pages /Kids [{kids}] /Count 3 >>",
            3: page,
            4: page,
            5: HELVETICA,
            6: stream(content),
        },
    )
