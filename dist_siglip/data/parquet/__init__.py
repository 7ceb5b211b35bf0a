"""Parquet files as shards: rows that hold a picture and its captions."""


class ParquetError(ValueError):
    """A row that cannot be read; one line with the reason."""


class UnknownEncodingError(ParquetError):
    """A page that pyarrow alone can decode."""


def one_line(error: BaseException) -> str:
    """Write the text of an error in one line, of a bounded length."""
    return " ".join(str(error).split())[:300]
