//! What the tests ask of a server, from another connection and in plain SQL: the code under test has no say in it.

use std::any::Any;

use diesel::{PgConnection, SqliteConnection};
use dlock_core::{LockKey, PostgresKey};
use dlock_tests::{Kind, TestConnection, is_locked_on_disk, wait_for};

/// The key as PostgreSQL's functions take it, MySQL's quoted name, or SQLite's number.
pub(crate) fn literal(kind: Kind, key: &LockKey) -> String {
    match kind {
        Kind::Postgres => match key.to_postgres().expect("a valid key") {
            PostgresKey::BigInt(number) => format!("'{number}'::bigint"),
            PostgresKey::Pair(first, second) => format!("'{first}'::int, '{second}'::int"),
        },
        Kind::Mysql => {
            let name = key.to_mysql().expect("a valid key").replace('\'', "''");
            format!("'{}'", name.replace('\\', "\\\\"))
        }
        Kind::Sqlite => key.to_sqlite().expect("a valid key").to_string(),
    }
}

/// The condition for the rows of a key in `pg_locks`.
pub(crate) fn pg_locks_of(key: &LockKey) -> String {
    let (classid, objid, objsubid) = match key.to_postgres().expect("a valid key") {
        PostgresKey::BigInt(key) => ((key >> 32) as u32, key as u32, 1),
        PostgresKey::Pair(first, second) => (first as u32, second as u32, 2),
    };
    format!(
        "locktype = 'advisory' AND classid = {classid} AND objid = {objid} AND objsubid = {objsubid} \
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
}

/// How the locks on a key are held on PostgreSQL, and by how many.
pub(crate) fn modes(observer: &mut PgConnection, key: &str) -> String {
    let sql = format!(
        "SELECT string_agg(mode, ' ' ORDER BY mode) FROM pg_locks WHERE granted AND {}",
        pg_locks_of(&key.into())
    );
    observer.text(&sql).unwrap_or_default()
}

/// The sessions that hold the lock, in whatever mode.
pub(crate) fn holders<O: TestConnection>(observer: &mut O, key: impl Into<LockKey>) -> Vec<i64> {
    let key = key.into();
    let ids = match O::KIND {
        Kind::Postgres => observer.text(&format!(
            "SELECT string_agg(DISTINCT pid::text, ' ') FROM pg_locks WHERE granted AND {}",
            pg_locks_of(&key)
        )),
        Kind::Mysql => observer.text(&format!(
            "SELECT CAST(IS_USED_LOCK({}) AS CHAR)",
            literal(O::KIND, &key)
        )),
        Kind::Sqlite => {
            let observer = (observer as &mut dyn Any).downcast_mut();
            sqlite_holders(observer.expect("BUG: its kind is SQLite"), &key)
        }
    };
    let ids = ids.unwrap_or_default();
    let parse = |id: &str| id.parse().expect("a number");
    let mut ids: Vec<i64> = ids.split_whitespace().map(parse).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Whom dlock's own table tells, and what the operating system says of the lock file.
fn sqlite_holders(conn: &mut SqliteConnection, key: &LockKey) -> Option<String> {
    let number = key.to_sqlite().expect("a valid key");
    let path = conn.text("SELECT file FROM pragma_database_list WHERE name = 'main'");
    if !is_locked_on_disk(&path.expect("a path"), number) {
        return None;
    }
    let table = conn.text(&format!("SELECT dlock_holders({number})"))?;
    let granted = table.lines().filter_map(|line| {
        let parts: Vec<&str> = line.split(' ').collect();
        (parts[3] == "1").then_some(parts[0])
    });
    Some(granted.collect::<Vec<_>>().join(" "))
}

/// Less a key, this is a number that dlock never gives to a request, and no other session either.
const SQLITE_REQUEST: &str = "-dlock_session()";

/// Takes the lock with plain SQL, if it is free.
pub(crate) fn try_lock<O: TestConnection>(conn: &mut O, key: impl Into<LockKey>) -> bool {
    let key = literal(O::KIND, &key.into());
    let sql = match O::KIND {
        Kind::Postgres => format!("SELECT pg_try_advisory_lock({key})"),
        Kind::Mysql => format!("SELECT GET_LOCK({key}, 0)"),
        Kind::Sqlite => format!("SELECT dlock_acquire({key}, 1, 0, {SQLITE_REQUEST} - {key})"),
    };
    conn.number(&sql) == Some(1)
}

/// Releases with plain SQL what [`try_lock`] took.
#[track_caller]
pub(crate) fn unlock<O: TestConnection>(conn: &mut O, key: impl Into<LockKey>) {
    let key = literal(O::KIND, &key.into());
    let sql = match O::KIND {
        Kind::Postgres => format!("SELECT pg_advisory_unlock({key})"),
        Kind::Mysql => format!("SELECT RELEASE_LOCK({key})"),
        Kind::Sqlite => format!("SELECT dlock_release({key}, {SQLITE_REQUEST} - {key})"),
    };
    assert_eq!(conn.number(&sql), Some(1), "the lock was held");
}

/// Another session holds the lock, alone, and the observer cannot have it.
#[track_caller]
pub(crate) fn assert_held_by<O: TestConnection>(
    observer: &mut O,
    key: impl Into<LockKey>,
    backend_id: i64,
) {
    let key = key.into();
    assert_ne!(observer.backend_id(), backend_id, "ask another connection");
    assert_eq!(holders(observer, &key), [backend_id], "holders of {key}");
    assert!(!try_lock(observer, &key), "{key} is held");
}

/// Nobody holds the lock, and the observer can have it.
#[track_caller]
pub(crate) fn assert_free<O: TestConnection>(observer: &mut O, key: impl Into<LockKey>) {
    let key = key.into();
    let nobody: [i64; 0] = [];
    assert_eq!(holders(observer, &key), nobody, "holders of {key}");
    assert!(try_lock(observer, &key), "{key} is free");
    unlock(observer, &key);
}

/// The lock becomes free: what a drop sends takes a moment, and so does the end of a session.
#[track_caller]
pub(crate) fn wait_until_free<O: TestConnection>(observer: &mut O, key: impl Into<LockKey>) {
    let key = key.into();
    wait_for(format!("{key} to be free"), || {
        holders(observer, &key).is_empty()
    });
    assert_free(observer, &key);
}

/// Ends another session, and waits until it is gone.
#[track_caller]
pub(crate) fn kill<O: TestConnection>(observer: &mut O, backend_id: i64) {
    observer.kill(backend_id);
    wait_for("the end of the session", || {
        !observer.is_connected(backend_id)
    });
}

/// Frees every lock of the session that sends it, behind the back of its guards.
pub(crate) const fn release_all(kind: Kind) -> &'static str {
    match kind {
        Kind::Postgres => "SELECT pg_advisory_unlock_all()",
        Kind::Mysql => "DO RELEASE_ALL_LOCKS()",
        Kind::Sqlite => "SELECT dlock_release_all()",
    }
}
