"""sqlalchemy-dlock, measured by itself.

Without arguments it prints versions. With a server's URL and a key it prints what the server calls its two sessions, and
then measures one turn for each line of standard input (`free`: acquire and release a free lock; `hand-over`: from before
the release here to after the acquire, with a limit, in another thread) and prints nanoseconds.
"""

import platform
import sys
import threading
import time
from importlib.metadata import version

from sqlalchemy import create_engine, text
from sqlalchemy_dlock import create_sadlock

LIMIT = 60
GOLDEN = 0.618033988749895


def versions():
    names = ["sqlalchemy-dlock", "SQLAlchemy", "psycopg2-binary", "PyMySQL"]
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


def measure_free(connection, key):
    begin = time.perf_counter_ns()
    lock = create_sadlock(connection, key)
    lock.acquire()
    lock.release()
    return time.perf_counter_ns() - begin


def measure_free_with_limit(connection, key):
    """MariaDB refuses to wait without a limit as this library asks for it."""
    begin = time.perf_counter_ns()
    lock = create_sadlock(connection, key)
    lock.acquire(timeout=LIMIT)
    lock.release()
    return time.perf_counter_ns() - begin


def measure_hand_over(holding, waiting, key, pause):
    ends = []

    def wait():
        lock = create_sadlock(waiting, key)
        assert lock.acquire(timeout=LIMIT)
        ends.append(time.perf_counter_ns())
        lock.release()

    lock = create_sadlock(holding, key)
    lock.acquire(timeout=LIMIT)
    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(pause)
    begin = time.perf_counter_ns()
    lock.release()
    waiter.join()
    return ends[0] - begin


def main():
    if len(sys.argv) == 1:
        print(versions())
        return
    url, key = sys.argv[1:]
    postgres = url.startswith("postgres")
    driver = "postgresql+psycopg2" if postgres else "mysql+pymysql"
    engine = create_engine(driver + "://" + url.split("://", 1)[1])
    with engine.connect() as one, engine.connect() as other:
        for connection in one, other:
            print(connection.scalar(text("SELECT pg_backend_pid()" if postgres else "SELECT CONNECTION_ID()")), flush=True)
            connection.rollback()
        free = measure_free if postgres else measure_free_with_limit
        turn = 0
        for line in sys.stdin:
            if line.strip() == "free":
                print(free(one, key), flush=True)
            else:
                # On PostgreSQL it polls each second, and the release falls anywhere in between.
                turn += 1
                pause = 0.05 + (turn * GOLDEN % 1 if postgres else 0)
                print(measure_hand_over(one, other, key, pause), flush=True)


main()
