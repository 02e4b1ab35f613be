//! The SQL functions that the core's statements call.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel::sql_types::{Binary, Text};
use dlock_core::Mode;
use dlock_core::proto::Sqlite;

use super::function_error::{self, FunctionError, Reply};
use super::session::{Acquired, Session};
use super::table::{self, Searched, Slots};

#[allow(missing_docs, unreachable_pub, reason = "made by Diesel")]
mod sql {
    use diesel::sql_types::{BigInt, Text};

    #[diesel::declare_sql_function]
    extern "SQL" {
        fn dlock_acquire(key: BigInt, exclusive: BigInt, millis: BigInt, request: BigInt)
        -> BigInt;
        fn dlock_acquire_slot(
            gate: BigInt,
            permits: BigInt,
            again: BigInt,
            millis: BigInt,
            request: BigInt,
        ) -> BigInt;
        fn dlock_slot_holders(gate: BigInt, permits: BigInt) -> Text;
        fn dlock_release(key: BigInt, request: BigInt) -> BigInt;
        fn dlock_is_held(key: BigInt, request: BigInt) -> BigInt;
        fn dlock_all_held(holds: Text) -> BigInt;
        fn dlock_fencing_token(key: BigInt, request: BigInt) -> BigInt;
        fn dlock_holders(key: BigInt) -> Text;
        fn dlock_check(key: BigInt, request: BigInt) -> Text;
        fn dlock_release_all() -> BigInt;
        fn dlock_copy() -> BigInt;
        fn dlock_session_state(session: BigInt) -> BigInt;
        fn dlock_session() -> BigInt;
    }
}

/// A row of `PRAGMA database_list`.
#[derive(QueryableByName)]
struct Listed {
    #[diesel(sql_type = Text)]
    name: String,
    /// A path, not always UTF-8. Empty for databases that are not files.
    #[diesel(sql_type = Binary)]
    file: Vec<u8>,
}

const OF_ANOTHER: &str = "another version of dlock-diesel, or the same one before a fork, has made this connection \
    ready for locks: use that version on it, or open another connection";

/// How long [`enable`] retries while other connections write.
const PATIENCE: Duration = Duration::from_secs(5);

/// Adds the functions unless the connection has them: adding them again would free the locks that it holds.
pub(super) fn enable(conn: &mut SqliteConnection) -> QueryResult<()> {
    let begin = Instant::now();
    // SQLite reads the schema to prepare the first statement of a connection. Later statements of dlock do not touch
    // the database.
    let session = loop {
        match diesel::select(sql::dlock_session()).get_result(conn) {
            Ok(session) => break session,
            Err(error) if function_error::is_not_enabled(&error) => return add_all(conn),
            Err(error) if begin.elapsed() > PATIENCE => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(2)),
        }
    };
    let copy: QueryResult<i64> = diesel::select(sql::dlock_copy()).get_result(conn);
    if copy != Ok(*COPY) || table::session_state(session) == 0 {
        return Err(FunctionError::other(OF_ANOTHER).into());
    }
    Ok(())
}

/// Identifies this copy of the crate: two versions linked into one program use the same session numbers.
static COPY: LazyLock<i64> = LazyLock::new(|| RandomState::new().build_hasher().finish() as i64);

fn add_all(conn: &mut SqliteConnection) -> QueryResult<()> {
    let listed: Vec<Listed> = diesel::sql_query("PRAGMA database_list").load(conn)?;
    let main = listed.into_iter().find(|database| database.name == "main");
    let path = main.map(|main| main.file).filter(|file| !file.is_empty());
    let session = Session::new(path.map(to_path))?;
    add(conn, &Arc::new(session))
}

#[cfg(unix)]
fn to_path(bytes: Vec<u8>) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(not(unix))]
fn to_path(bytes: Vec<u8>) -> PathBuf {
    String::from_utf8_lossy(&bytes).into_owned().into()
}

/// SQLite drops the functions when the connection is closed, and the session with them.
fn add(conn: &mut SqliteConnection, session: &Arc<Session>) -> QueryResult<()> {
    let of = || Arc::clone(session);

    let session = of();
    let acquire = move |key: i64, exclusive: i64, millis: i64, request: i64| {
        let mode = if exclusive == 1 {
            Mode::Exclusive
        } else {
            Mode::Shared
        };
        let limit = u64::try_from(millis).ok().map(Duration::from_millis);
        let acquired = number(key).and_then(|key| session.acquire(key, mode, limit, request));
        Reply(acquired.map(|acquired| match acquired {
            Acquired::Granted => Sqlite::GRANTED,
            Acquired::Busy => Sqlite::BUSY,
            Acquired::GivenUp => Sqlite::GIVEN_UP,
        }))
    };
    sql::dlock_acquire_utils::register_nondeterministic_impl(conn, acquire)?;

    let session = of();
    let acquire_slot = move |gate: i64, permits: i64, again: i64, millis: i64, request: i64| {
        let limit = u64::try_from(millis).ok().map(Duration::from_millis);
        let searched = slots(gate, permits)
            .and_then(|slots| session.acquire_slot(slots, again == 1, limit, request));
        Reply(searched.map(|searched| match searched {
            Searched::Found(slot) => slot.into(),
            Searched::NotFound => Sqlite::NO_SLOT,
            Searched::GivenUp => Sqlite::GIVEN_UP,
        }))
    };
    sql::dlock_acquire_slot_utils::register_nondeterministic_impl(conn, acquire_slot)?;

    let session = of();
    let slot_holders = move |gate: i64, permits: i64| {
        let holders = slots(gate, permits).and_then(|slots| session.slot_holders(slots));
        Reply(holders.map(|holders| Sqlite::write_holders(&holders)))
    };
    sql::dlock_slot_holders_utils::register_nondeterministic_impl(conn, slot_holders)?;

    let session = of();
    let release = move |key: i64, request: i64| {
        truth(number(key).and_then(|key| session.release(key, request)))
    };
    sql::dlock_release_utils::register_nondeterministic_impl(conn, release)?;

    let session = of();
    let is_held = move |key: i64, request: i64| {
        truth(number(key).and_then(|key| session.is_held(key, request)))
    };
    sql::dlock_is_held_utils::register_nondeterministic_impl(conn, is_held)?;

    let session = of();
    let all_held = move |holds: String| {
        truth(pairs(&holds).and_then(|holds| {
            let mut held = true;
            for (key, request) in holds {
                held = held && session.is_held(number(key)?, request)?;
            }
            Ok(held)
        }))
    };
    sql::dlock_all_held_utils::register_nondeterministic_impl(conn, all_held)?;

    let session = of();
    let draw_token = move |key: i64, request: i64| {
        Reply(number(key).and_then(|key| session.draw_token(key, request)))
    };
    sql::dlock_fencing_token_utils::register_nondeterministic_impl(conn, draw_token)?;

    let session = of();
    let holders = move |key: i64| {
        let holders = number(key).and_then(|key| session.holders(key));
        Reply(holders.map(|holders| Sqlite::write_holders(&holders)))
    };
    sql::dlock_holders_utils::register_nondeterministic_impl(conn, holders)?;

    let session = of();
    let check = move |key: i64, request: i64| session.check(key as u64, request);
    sql::dlock_check_utils::register_nondeterministic_impl(conn, check)?;

    let session = of();
    // The counterpart of `pg_advisory_unlock_all`, for people who work in SQL. dlock does not call it.
    let release_all = move || session.release_all();
    sql::dlock_release_all_utils::register_nondeterministic_impl(conn, release_all)?;

    sql::dlock_copy_utils::register_nondeterministic_impl(conn, || *COPY)?;

    // Of any connection of this process: 0 is closed, 1 open, 2 waiting for a lock. Like the one above, for people who
    // work in SQL.
    sql::dlock_session_state_utils::register_nondeterministic_impl(conn, table::session_state)?;

    // The last one: where it exists, all others do.
    let session = of();
    sql::dlock_session_utils::register_nondeterministic_impl(conn, move || session.id())
}

fn truth(is_true: Result<bool, FunctionError>) -> Reply<i64> {
    Reply(is_true.map(i64::from))
}

/// Checks a key, because SQL that is not dlock's may call the functions as well.
fn number(key: i64) -> Result<u64, FunctionError> {
    let number = u64::try_from(key).ok().filter(|number| *number < 1 << 61);
    number.ok_or_else(|| {
        FunctionError::other(format!(
            "{key} is not the number of a lock: these are at least 0 and less than 2^61"
        ))
    })
}

/// Several holds in one text: the key and the request of each.
fn pairs(text: &str) -> Result<Vec<(i64, i64)>, FunctionError> {
    let wrong =
        || FunctionError::other("these are no holds: each is a key and the number of a request");
    let numbers = text
        .split(' ')
        .map(|number| number.parse().map_err(|_| wrong()));
    let numbers = numbers.collect::<Result<Vec<i64>, _>>()?;
    match numbers.len() % 2 {
        0 => Ok(numbers
            .chunks_exact(2)
            .map(|pair| (pair[0], pair[1]))
            .collect()),
        _ => Err(wrong()),
    }
}

/// Checks a semaphore, for the same reason.
fn slots(gate: i64, permits: i64) -> Result<Slots, FunctionError> {
    let gate = number(gate)?;
    let permits = u32::try_from(permits)
        .ok()
        .filter(|permits| (1..=1000).contains(permits));
    match permits {
        Some(permits) if gate % 1024 == 0 => Ok(Slots { gate, permits }),
        _ => Err(FunctionError::other(
            "this is no semaphore: its gate is a multiple of 1024, and it has 1 to 1000 permits",
        )),
    }
}
