#!/usr/bin/env python3
"""Live proof of the presets: other libraries take a lock, and the server shows the one that dlock takes.

    python3 -m venv peers
    peers/bin/pip install sqlalchemy-dlock psycopg2-binary pymysql django-pglock psycopg
    peers/bin/python tests/peers.py postgresql://USER:PASSWORD@HOST:PORT/DB mysql+pymysql://USER:PASSWORD@HOST:PORT/DB

It goes through docs/key-vectors.json: each row of such a preset that a server has a lock for. The tests of dlock compare
the same rows with dlock's own code. It was run with sqlalchemy-dlock 0.8.1 and 0.9.0, and django-pglock 1.8.0.
"""

import json
import pathlib
import sys
from importlib.metadata import version

import sqlalchemy
from sqlalchemy import text
from sqlalchemy_dlock import create_sadlock

ROWS = json.loads((pathlib.Path(__file__).parent / "../docs/key-vectors.json").read_text(encoding="utf-8"))


def rows(preset, server):
    """The keys of a preset, as the library takes them, and the lock that each of them is on a server."""
    for row in ROWS:
        if preset in row["key"] and "error" not in row[server]:
            inner = row["key"][preset]
            if "i64" in inner:
                yield row["note"], int(inner["i64"]), row[server]
            elif "bytes" in inner:
                yield row["note"], bytes.fromhex(inner["bytes"]), row[server]


def as_text(key):
    """Text where it is text."""
    if isinstance(key, int):
        return key
    try:
        return key.decode("utf-8")
    except UnicodeDecodeError:
        return key


POSTGRES = """
SELECT objsubid, (classid::bigint << 32) | objid::bigint FROM pg_locks
WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid()
"""


def check(note, seen, expected):
    if seen != expected:
        sys.exit(f"{note}: the library holds {seen}, the vector says {expected}")


def sqlalchemy_dlock(url):
    engine = sqlalchemy.create_engine(url)
    server = "postgres" if url.startswith("postgres") else "mysql"
    count = 0
    with engine.connect() as connection, engine.connect() as other:
        for note, key, expected in rows("sqlalchemy_dlock", server):
            with create_sadlock(connection, as_text(key), contextual_timeout=10):
                if server == "postgres":
                    [(kind, number)] = connection.execute(text(POSTGRES)).all()
                    check(note, {"bigint": str(number)} if kind == 1 else None, expected)
                else:
                    name = expected["name"]
                    here = connection.execute(text("SELECT CONNECTION_ID()")).scalar_one()
                    holder = other.execute(text("SELECT IS_USED_LOCK(:name)"), {"name": name}).scalar_one()
                    check(note, {"name": name} if holder == here else None, expected)
            connection.rollback()
            count += 1
    print(f"sqlalchemy-dlock {version('sqlalchemy-dlock')} on {server}: {count} rows agree")


def django_pglock(url):
    import django
    from django.conf import settings

    parts = sqlalchemy.engine.make_url(url)
    settings.configure(
        INSTALLED_APPS=["pgactivity", "pglock"],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": parts.database,
                "USER": parts.username,
                "PASSWORD": parts.password,
                "HOST": parts.host,
                "PORT": parts.port,
            }
        },
    )
    django.setup()
    import pglock
    from django.db import connection

    count = 0
    for note, key, expected in rows("django_pglock", "postgres"):
        with pglock.advisory(as_text(key)), connection.cursor() as cursor:
            cursor.execute(POSTGRES)
            [(kind, number)] = cursor.fetchall()
            check(note, {"bigint": str(number)} if kind == 1 else None, expected)
        count += 1
    print(f"django-pglock {version('django-pglock')}: {count} rows agree")


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__.strip())
    for url in sys.argv[1:]:
        sqlalchemy_dlock(url)
        if url.startswith("postgres"):
            django_pglock(url)


main()
