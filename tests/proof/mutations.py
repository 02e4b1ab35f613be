#!/usr/bin/env python3
"""Breaks dlock on purpose, and expects that dlock-proof finds it out.

    tests/proof/mutations.py [NAME ..]        all, or some
    tests/proof/mutations.py --list

It copies the sources to target/mutations, puts all mutations into the copy, each behind a variable of the environment
(DLOCK_MUTATION), builds once, and runs dlock-proof for each of them. Without a mutation the same runs must find nothing.
PROOF_POSTGRES and PROOF_MYSQL are servers to use: otherwise it starts its own for each run. PROOF_ARGUMENTS takes
the place of the arguments for dlock-proof, PROOF_TARGET is the folder of the build.
"""
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
COPY = ROOT / "target" / "mutations"
# Not that of the sources themselves: cargo takes the one for the other.
TARGET = pathlib.Path(os.environ.get("PROOF_TARGET", COPY / "target"))
MUTATED = 'std::env::var("DLOCK_MUTATION").is_ok_and(|name| name == "{}")'

ARGUMENTS = "--kills 2 --cuts 2 --stops 12 --restarts 0 --drops 100 --operations 400 --first --patience 20"

# name, what is wrong then, server, file, text, text with MUTATED
MUTATIONS = [
    ("pg-timeout-grants", "a wait whose limit has passed counts as granted", "postgres",
     "dlock-core/src/postgres/session.rs",
     "            Next::GiveUp => Step::Done(Ok(None)),\n            Next::Sleep(interval) => {\n                self.state = State::Sleep;",
     "            Next::GiveUp if MUTATED => self.granted(),\n            Next::GiveUp => Step::Done(Ok(None)),\n            Next::Sleep(interval) => {\n                self.state = State::Sleep;"),
    ("pg-release-sends-nothing", "a release says that it is done, and sends nothing", "postgres",
     "dlock-core/src/postgres/release.rs",
     "            _ => Step::Query(self.unlock()),\n", "            _ if MUTATED => RELEASED,\n            _ => Step::Query(self.unlock()),\n"),
    ("pg-dropped-wait-stays", "a wait whose future is dropped is not taken back", "postgres",
     "dlock-core/src/postgres/session.rs",
     "        let Some(mark) = self.mark else {\n            return Abandoned::broken();",
     "        if MUTATED {\n            return Abandoned::default();\n        }\n        let Some(mark) = self.mark else {\n            return Abandoned::broken();"),
    ("pg-dropped-begin-stays", "a transaction with its lock stays open when the future that begins it is dropped", "postgres",
     "dlock-core/src/postgres/begin.rs",
     "        let (broken, cancel) = match &self.state {\n            State::Sleep => return Abandoned::default(),",
     "        let (broken, cancel) = match &self.state {\n            _ if MUTATED => return Abandoned::default(),\n            State::Sleep => return Abandoned::default(),"),
    ("pg-slot-is-wrong", "a semaphore tells everybody slot 0", "postgres",
     "dlock-core/src/postgres/semaphore.rs", "            slot: Some(slot),\n",
     "            slot: Some(if MUTATED { 0 } else { slot }),\n"),
    ("token-goes-back", "a fencing token falls where it should rise", "postgres",
     "dlock-core/src/proto/token.rs", "    number.filter(|number| *number > 0).map(FencingToken::from)\n",
     "    let number = number.map(|number| if MUTATED { i64::MAX - number } else { number });\n"
     "    number.filter(|number| *number > 0).map(FencingToken::from)\n"),
    ("several-take-one", "several locks: only the first is taken", "postgres",
     "dlock-core/src/proto/several.rs", "    keys.sort_by_key(|(key, _)| order(key));\n",
     "    keys.sort_by_key(|(key, _)| order(key));\n    if MUTATED {\n        keys.truncate(1);\n    }\n"),
    ("mysql-timeout-grants", "a wait whose limit has passed counts as granted", "mysql",
     "dlock-core/src/mysql/acquire.rs", "            AfterBusy::GiveUp => Step::Done(Ok(None)),\n",
     "            AfterBusy::GiveUp if MUTATED => self.granted(),\n            AfterBusy::GiveUp => Step::Done(Ok(None)),\n"),
    ("mysql-release-sends-nothing", "a release says that it is done, and sends nothing", "mysql",
     "dlock-core/src/mysql/release.rs", "        Step::Query(match self.hold.slot {\n",
     "        if MUTATED {\n            return Step::Done(Ok(()));\n        }\n        Step::Query(match self.hold.slot {\n"),
    ("mysql-dropped-wait-stays", "a wait whose future is dropped is not taken back, and its connection is handed on", "mysql",
     "dlock-core/src/mysql/acquire.rs", "            _ if !self.droppable => return Abandoned::broken(),\n            State::Sleep => return Abandoned::default(),\n            State::Ask(request)\n",
     "            _ if MUTATED => return Abandoned::default(),\n            _ if !self.droppable => return Abandoned::broken(),\n            State::Sleep => return Abandoned::default(),\n            State::Ask(request)\n"),
    ("pg-poll-grants", "poll_every: a lock that another has counts as granted", "postgres",
     "dlock-core/src/postgres/session.rs", "                Step::Sleep(interval)\n            }\n            Next::First",
     "                if MUTATED {\n                    return self.granted();\n                }\n                Step::Sleep(interval)\n            }\n            Next::First"),
    ("pg-xact-is-free-early", "advisory_xact_lock: a lock that it has waited for is free at once", "postgres",
     "dlock-core/src/postgres/transaction.rs",
     '            "SAVEPOINT {savepoint}; {}; RELEASE SAVEPOINT {savepoint}",\n            sql::without_limits(millis, Lift::Statement, wait)\n',
     '            "SAVEPOINT {savepoint}; {}; {} SAVEPOINT {savepoint}",\n            sql::without_limits(millis, Lift::Statement, wait),\n'
     '            if MUTATED { "ROLLBACK TO" } else { "RELEASE" }\n'),
    ("managed-token-repeats", "a manager gives everybody the same fencing token", "postgres",
     "dlock-core/src/proto/manager/questions.rs", "            Outcome::Drawn(token) => Ok(token),\n",
     "            Outcome::Drawn(_) if MUTATED => Ok(crate::FencingToken::from(7)),\n            Outcome::Drawn(token) => Ok(token),\n"),
    ("managed-several-take-one", "several managed locks: only the first is taken", "postgres",
     "dlock-diesel-async/src/manager.rs", "        let ask = Ask::all(keys.into_iter().map(Into::into));\n",
     "        let keys = keys.into_iter().take(if MUTATED { 1 } else { usize::MAX });\n        let ask = Ask::all(keys.map(Into::into));\n"),
    ("manager-never-loses", "a manager does not count the lease of its sessions", "postgres",
     "dlock-diesel/src/manager/desk.rs", "            lease: D::HAS_LEASE.then_some(lease),\n",
     "            lease: (D::HAS_LEASE && !MUTATED).then_some(lease),\n"),
    ("manager-grants-twice", "a manager gives a lock to the next task while another has it", "postgres",
     "dlock-core/src/proto/manager/hold.rs", "        let free = self.tickets.is_empty() || ",
     "        let free = MUTATED || self.tickets.is_empty() || "),
    ("sync-drop-keeps", "sync: a guard that is dropped keeps its lock", "postgres",
     "dlock-diesel/src/guard.rs", "            // A release that failed has ended the session or marked the connection broken.\n            let _ = release(",
     "            if MUTATED {\n                return;\n            }\n            let _ = release("),
    ("sync-commit-without-lock", "sync: the lock around a transaction is free before COMMIT", "mysql",
     "dlock-diesel/src/transaction.rs", "    body::run(conn, ask, |conn| under_lock(conn, &key, begin, f))\n",
     "    if MUTATED {\n        body::run(&mut *conn, ask, |_| Ok::<(), E>(()))?;\n        return under_lock(conn, &key, begin, f);\n    }\n"
     "    body::run(conn, ask, |conn| under_lock(conn, &key, begin, f))\n"),
    ("sqlite-ignores-processes", "SQLite: a lock that another process has counts as free", "sqlite",
     "dlock-diesel/src/sqlite/database.rs", "            if !file.take(key, waiter.mode, local)? {\n",
     "            if !file.take(key, waiter.mode, local)? && !MUTATED {\n"),
    ("sqlite-keeps-the-byte", "SQLite: the process keeps a lock that its connections have released", "sqlite",
     "dlock-diesel/src/sqlite/database.rs", "        if let Some(file) = &mut self.file {\n            file.give_back(",
     "        if let Some(file) = self.file.as_mut().filter(|_| !MUTATED) {\n            file.give_back("),
    ("async-drop-keeps", "async: a guard that is dropped keeps its lock", "postgres",
     "dlock-diesel-async/src/guard.rs", "                part(conn, hold);\n                if let Some(cancel)",
     "                if MUTATED {\n                    return;\n                }\n                part(conn, hold);\n                if let Some(cancel)"),
    ("async-drop-is-not-broken", "async: a connection whose future was dropped is not marked broken", "mysql",
     "dlock-diesel-async/src/session.rs", "    status::mark_broken(status(conn));\n}\n\n/// Ends the server's session",
     "    if !MUTATED {\n        status::mark_broken(status(conn));\n    }\n}\n\n/// Ends the server's session"),
    ("async-commit-without-lock", "async: the lock around a transaction is free before COMMIT", "mysql",
     "dlock-diesel-async/src/transaction.rs", "    let key = guard.key().clone();\n    let result = under_lock(",
     "    let key = guard.key().clone();\n    if MUTATED {\n        let conn = guard.release().await.map_err(DieselError::from)?;\n"
     "        return under_lock(conn, &key, immediate, f).await;\n    }\n    let result = under_lock("),
]


def copied():
    COPY.mkdir(parents=True, exist_ok=True)
    files = subprocess.check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    for name in filter(None, files.decode().split("\0")):
        source, target = ROOT / name, COPY / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            if not target.is_symlink():
                target.symlink_to(os.readlink(source))
        elif source.is_file() and (not target.exists() or target.read_bytes() != source.read_bytes()):
            shutil.copy(source, target)


def mutated():
    texts = {}
    for name, _, _, file, old, new in MUTATIONS:
        text = texts.setdefault(file, (ROOT / file).read_text())
        if text.count(old) != 1:
            sys.exit(f"{name}: its text is {text.count(old)} times in {file}; the mutation needs a new one")
        texts[file] = text.replace(old, re.sub(r"\bMUTATED\b", lambda _: MUTATED.format(name), new))
    for file, text in texts.items():
        if (COPY / file).read_text() != text:
            (COPY / file).write_text(text)


def built():
    copied()
    mutated()
    command = ["cargo", "test", "--locked", "--workspace", "--all-features", "--test", "proof", "--no-run"]
    subprocess.run(command, cwd=COPY, check=True, env={**os.environ, "CARGO_TARGET_DIR": str(TARGET)})
    return shutil.copy(TARGET / "debug/dlock-proof", COPY / "dlock-proof")


def run(program, server, name):
    server = os.environ.get(f"PROOF_{server.upper()}", server)
    arguments = shlex.split(os.environ.get("PROOF_ARGUMENTS", ARGUMENTS))
    begin = time.monotonic()
    keep = str(COPY / "histories")
    done = subprocess.run([program, "run", server, *arguments, "--keep", keep], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, "DLOCK_MUTATION": name})
    found = [line.strip() for line in done.stdout.splitlines() if line.startswith("    ")]
    return found, time.monotonic() - begin, done.stdout


def main():
    names = sys.argv[1:]
    if names == ["--list"]:
        for name, wrong, server, file, *_ in MUTATIONS:
            print(f"{name}: {wrong} ({file}, on {server})")
        return
    program = built()
    chosen = [mutation for mutation in MUTATIONS if not names or mutation[0] in names]
    failed = []
    for server in sorted({server for _, _, server, *_ in chosen}):
        found, seconds, output = run(program, server, "")
        print(f"{'RED' if found else 'green'} without a mutation, on {server}, {seconds:.0f} s", flush=True)
        if found:
            failed.append(f"none on {server}")
            print(output)
    for name, wrong, server, *_ in chosen:
        found, seconds, output = run(program, server, name)
        if not found:
            failed.append(name)
        print(f"{'red' if found else 'NOT FOUND'} {name}: {wrong}, {seconds:.0f} s", flush=True)
        print(f"    {found[0][:200] if found else output[-1500:]}", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


main()
