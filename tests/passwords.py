"""Passwords that a server really asks for, and the search for them in all that is left."""

import base64
import itertools
import re
import subprocess
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import sqlalchemy

from tests.servers import GUARDED, POSTGRESQL

_PACKED = re.compile(r"deflate;([A-Za-z0-9+/=]+)")  # views of MLflow's UI, in its tags


def guard(address: str, user: str, password: str) -> str:
    """Hands a database to a user who needs a password.

    Args:
        address: Of an empty database, as its server's superuser.
        user: New.
        password: Of any characters.

    Returns:
        The address with user and password.
    """
    url = sqlalchemy.make_url(address)
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    literal = password.replace("'", "''").replace("%", "%%")
    with engine.begin() as connection:
        sql = f"CREATE ROLE {user} LOGIN IN ROLE {GUARDED} PASSWORD '{literal}'"
        connection.exec_driver_sql(sql)
        connection.exec_driver_sql(f"ALTER DATABASE {url.database} OWNER TO {user}")
    given = f"{user}:{quote(password, safe='')}"
    return f"{url.drivername}://{given}@{url.host}:{url.port}/{url.database}"


def forms(password: str) -> set[bytes]:
    """What of a password is the same however it is quoted or escaped; and inside of base64."""
    words = [word.encode() for word in re.findall(r"[a-z0-9]{8,}", password)]
    assert words, "it needs a run of letters and digits to be known by"
    return {form for word in words for form in (word, word.hex().encode(), *_in_base64(word))}


def _in_base64(word: bytes) -> Iterator[bytes]:
    """What is the same whatever stands around it, in each of the three places of a group."""
    for before in range(3):
        packed = base64.b64encode(bytes(before) + word)
        yield packed[4 * (before > 0) : 4 * ((before + len(word)) // 3)]


def dump(address: str) -> str:
    """All that a database of `new_database` holds, packed tags unpacked too."""
    url = sqlalchemy.make_url(address)
    server = ["-h", "127.0.0.1", "-p", str(url.port), "-U", "postgres", str(url.database)]
    command = [str(POSTGRESQL / "pg_dump"), *server]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    packed = _PACKED.findall(text)
    return "\n".join([text, *(zlib.decompress(base64.b64decode(each)).decode() for each in packed)])


def holding(folder: Path, password: str) -> list[Path]:
    """Files below a folder that contain a password, also inside of archives."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    looked_for = forms(password)
    return [
        path
        for path in files
        if any(form in text for form, text in itertools.product(looked_for, _contents(path)))
    ]


def _contents(path: Path) -> list[bytes]:
    contents = [str(path).encode(), path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            contents += [archive.read(name) for name in archive.namelist()]
    return contents
