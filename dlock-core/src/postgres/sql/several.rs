//! Statements about several locks. The keys are one bind, or one constant in a message, so that there is one text for
//! any number of them.

use super::parts::{HAS_OWN_LOCKS, has_own_locks, hold_mode, shared};
use super::prepared::transaction_timeout_is_set;
use super::tokens::IS_STANDBY;
use super::unread;
use crate::proto::{Bind, Columns, OpenTransaction, Prepared, Statement};
use crate::{Mode, PostgresKey};

/// Several keys as one value: an array of numbers, of which the first so many are `bigint` keys. The others are pairs,
/// each put together into one number.
#[derive(Debug)]
pub(super) struct List {
    array: String,
    bigints: i64,
}

impl List {
    pub(super) fn new(keys: &[PostgresKey]) -> Self {
        let number = |key: &PostgresKey| match *key {
            PostgresKey::BigInt(key) => key.to_string(),
            PostgresKey::Pair(first, second) => {
                (i64::from(first) << 32 | i64::from(second as u32)).to_string()
            }
        };
        let is_bigint = |key: &&PostgresKey| matches!(key, PostgresKey::BigInt(_));
        Self {
            array: format!(
                "{{{}}}",
                keys.iter().map(number).collect::<Vec<_>>().join(",")
            ),
            bigints: keys.iter().take_while(is_bigint).count() as i64,
        }
    }

    pub(super) fn binds(self) -> [Bind; 2] {
        [Bind::Text(self.array), Bind::BigInt(self.bigints)]
    }

    /// The rows of the keys in their order, as [`keys!`].
    fn rows(&self) -> String {
        format!(
            "pg_catalog.unnest('{}'::bigint[]) WITH ORDINALITY k(x, n)",
            self.array
        )
    }

    /// Calls a function with each of them, as [`call!`].
    fn call(&self, function: &str, mode: Mode, then: &str) -> String {
        let (mode, bigints) = (shared(mode), self.bigints);
        format!(
            "CASE WHEN pg_catalog.int8le(k.n, '{bigints}') THEN pg_catalog.{function}{mode}(k.x){then} \
             ELSE pg_catalog.{function}{mode}({PAIR}){then} END"
        )
    }
}

macro_rules! pair {
    () => {
        "pg_catalog.int8shr(k.x, 32)::int, pg_catalog.int8shr(pg_catalog.int8shl(k.x, 32), 32)::int"
    };
}

/// The two parts of a pair, with their signs.
const PAIR: &str = pair!();

macro_rules! keys {
    () => {
        "pg_catalog.unnest($1::pg_catalog.text::bigint[]) WITH ORDINALITY k(x, n)"
    };
}

macro_rules! call {
    ($function:literal, $mode:literal, $then:literal) => {
        concat!(
            "CASE WHEN pg_catalog.int8le(k.n, $2) THEN pg_catalog.",
            $function,
            $mode,
            "(k.x)",
            $then,
            " ELSE pg_catalog.",
            $function,
            $mode,
            "(",
            pair!(),
            ")",
            $then,
            " END"
        )
    };
}

/// The binds by their numbers: the keys, how many of them are not pairs, the mark.
macro_rules! take_all {
    ($mode:literal) => {
        concat!(
            "SELECT pg_catalog.int8um(r.n) FROM (SELECT CASE WHEN pg_catalog.int8eq($3, 0) \
             THEN (SELECT pg_catalog.min(k.n) FROM ",
            keys!(),
            " WHERE NOT ",
            call!("pg_advisory_unlock", $mode, ""),
            ") WHEN ",
            has_own_locks!(),
            " THEN -3 ELSE (SELECT k.n FROM ",
            keys!(),
            " WHERE NOT ",
            call!("pg_try_advisory_xact_lock", $mode, ""),
            " LIMIT 1) END AS n OFFSET 0) r WHERE NOT CASE WHEN r.n IS NOT NULL THEN false \
             WHEN pg_catalog.int8eq($3, 0) THEN true ELSE pg_catalog.pg_sleep(0) IS NOT NULL AND \
             pg_catalog.set_config('dlock.granted', $3::pg_catalog.text, false) IS NOT NULL AND \
             NOT EXISTS(SELECT FROM ",
            keys!(),
            " WHERE ",
            call!("pg_advisory_lock", $mode, " IS NULL"),
            ") END /* "
        )
    };
}

/// Takes all of the session's locks, or none, and does not wait: no row, which stands for 1, or the place of the first
/// that is taken, as a negative number; or [`STANDBY`](super::STANDBY). If it succeeds it leaves the mark in the
/// session. With 0 for the mark it releases them: no row, or the place of the first that was not held.
///
/// - All are taken as the transaction's first, in their order, up to the first that is not free. An error or a cancel
///   undoes that.
/// - Then each is taken as the session's, which does not wait any more, and the statement answers without a row: see
///   [`acquire`](super::acquire). An error between them would leave some behind. It can only be a cancel, in the few
///   microseconds that this takes.
/// - The subqueries depend on nothing, so PostgreSQL executes each once, when the expression reaches it.
/// - One text does both, for the reason given at [`droppable`](super::droppable).
pub(in crate::postgres) fn take_all(keys: &[PostgresKey], mode: Mode, mark: i64) -> Statement {
    const TAKE: [&[&str]; 2] = [
        &[take_all!(""), ", ", ", ", " */"],
        &[take_all!("_shared"), ", ", ", ", " */"],
    ];
    let [array, bigints] = List::new(keys).binds();
    let sql = TAKE[usize::from(mode == Mode::Shared)];
    let binds = [array, bigints, Bind::BigInt(mark)];
    Statement::number(Prepared::ByText, sql, binds).columns(Columns::NoRow)
}

/// [`take_all`] with 0 for the mark.
pub(in crate::postgres) fn unlock_all(keys: &[PostgresKey], mode: Mode) -> Statement {
    take_all(keys, mode, 0)
}

/// Tries to take locks of the open transaction, in their order, up to the first that is taken: no row, or the place of
/// that one, as a negative number. Those before it are held then.
pub(in crate::postgres) fn try_all_in_transaction(keys: &[PostgresKey], mode: Mode) -> Statement {
    macro_rules! try_all {
        ($mode:literal) => {
            concat!(
                "SELECT pg_catalog.int8um(k.n) FROM ",
                keys!(),
                " WHERE NOT ",
                call!("pg_try_advisory_xact_lock", $mode, ""),
                " LIMIT 1 /* "
            )
        };
    }
    const TRY: [&[&str]; 2] = [
        &[try_all!(""), ", ", " */"],
        &[try_all!("_shared"), ", ", " */"],
    ];
    let sql = TRY[usize::from(mode == Mode::Shared)];
    Statement::number(Prepared::ByText, sql, List::new(keys).binds()).columns(Columns::NoRow)
}

macro_rules! how_many_held {
    () => {
        concat!(
            "(SELECT pg_catalog.count(*) FROM ",
            keys!(),
            ", pg_catalog.pg_locks l WHERE pg_catalog.texteq(l.locktype, 'advisory') \
             AND pg_catalog.int4eq(l.pid, pg_catalog.pg_backend_pid()) AND l.granted \
             AND pg_catalog.int8eq(l.classid::bigint, pg_catalog.int8and(pg_catalog.int8shr(k.x, 32), 4294967295)) \
             AND pg_catalog.int8eq(l.objid::bigint, pg_catalog.int8and(k.x, 4294967295)) \
             AND pg_catalog.int24eq(l.objsubid, CASE WHEN pg_catalog.int8le(k.n, $2) THEN 1 ELSE 2 END) \
             AND pg_catalog.texteq(l.mode, $3::pg_catalog.text))"
        )
    };
}

/// Whether this session holds all of them in this mode: 1 or 0.
pub(in crate::postgres) fn all_held(keys: &[PostgresKey], mode: Mode) -> Statement {
    const SQL: &[&str] = &[
        concat!(
            "SELECT pg_catalog.int8eq(",
            how_many_held!(),
            ", pg_catalog.array_length($1::pg_catalog.text::bigint[], 1))::int::bigint /* "
        ),
        ", ",
        ", ",
        " */",
    ];
    let [array, bigints] = List::new(keys).binds();
    let binds = [array, bigints, Bind::Text(hold_mode(mode).to_owned())];
    Statement::number(Prepared::ByText, SQL, binds)
}

/// For after the prepared statement `failed` has failed: how many of them this session holds in this mode, and whether
/// it knows that statement. See [`verify`](super::verify).
pub(in crate::postgres) fn verify_all(
    keys: &[PostgresKey],
    mode: Mode,
    failed: &Statement,
) -> Statement {
    const SQL: &[&str] = &[
        concat!(
            "SELECT ",
            how_many_held!(),
            ", (EXISTS(SELECT FROM pg_catalog.pg_prepared_statements p WHERE \
             pg_catalog.int4gt(pg_catalog.strpos(p.statement, $4::pg_catalog.text), 0)))::int::bigint /* "
        ),
        ", ",
        ", ",
        ", ",
        " */",
    ];
    let [array, bigints] = List::new(keys).binds();
    let failed = failed.sql.first().copied().unwrap_or_default();
    let binds = [
        array,
        bigints,
        Bind::Text(hold_mode(mode).to_owned()),
        Bind::Text(failed.to_owned()),
    ];
    Statement::number(Prepared::Never, SQL, binds).columns(Columns::Pair)
}

/// Releases all of them.
fn unlock_all_text(keys: &[PostgresKey], mode: Mode) -> String {
    let list = List::new(keys);
    let unlock = list.call("pg_advisory_unlock", mode, "");
    format!(
        "(SELECT pg_catalog.count(*) FROM {} WHERE {unlock})",
        list.rows()
    )
}

/// [`release_if_granted`](super::release_if_granted) for several locks. It is sent only once, for the reason of
/// [`release_all_unread`].
pub(in crate::postgres) fn release_all_if_granted(
    keys: &[PostgresKey],
    mode: Mode,
    mark: i64,
) -> String {
    unread(&format!(
        "SELECT CASE WHEN pg_catalog.texteq(pg_catalog.current_setting('dlock.granted', true), '{mark}') \
         AND pg_catalog.set_config('dlock.granted', '', false) IS NOT NULL THEN {} END",
        unlock_all_text(keys, mode)
    ))
}

/// [`release_unread`](super::release_unread) for several locks. It is sent only once: a cancel that comes after some of
/// them would also take back what the first copy tells the second.
pub(in crate::postgres) fn release_all_unread(
    keys: &[PostgresKey],
    mode: Mode,
    transaction: OpenTransaction,
) -> String {
    let unlock = format!("SELECT {}", unlock_all_text(keys, mode));
    match transaction {
        OpenTransaction::None => unread(&unlock),
        OpenTransaction::RollBack => format!("ROLLBACK; {}", unread(&unlock)),
        OpenTransaction::Keep => unlock,
    }
}

/// An expression that takes the transaction's locks, in their order, and fails if it does not get all of them. It waits
/// so many milliseconds in all; with 0 it fails with a token. In a transaction that dlock has begun it fails with
/// another one instead if `transaction_timeout` might end the session.
fn take_in_transaction(keys: &[PostgresKey], mode: Mode, millis: u32, begun: bool) -> String {
    let list = List::new(keys);
    let attempt = list.call("pg_try_advisory_xact_lock", mode, "");
    let rows = list.rows();
    // `concat` is not evaluated by the planner.
    let cut_short = match begun {
        true => concat!(
            " WHEN ",
            transaction_timeout_is_set!(),
            " THEN pg_catalog.concat('dlock_cut_short')::pg_catalog.json IS NULL"
        ),
        false => "",
    };
    if millis == 0 {
        return format!(
            "CASE WHEN EXISTS(SELECT FROM {rows} WHERE CASE WHEN {attempt} THEN false{cut_short} ELSE true END) \
             THEN pg_catalog.concat('dlock_taken')::pg_catalog.json::pg_catalog.text END"
        );
    }
    let wait = list.call("pg_advisory_xact_lock", mode, " IS NULL");
    // `format` prints its first argument, the old limit, and evaluates all: see `acquire`.
    format!(
        "pg_catalog.set_config('lock_timeout', pg_catalog.format('%s', pg_catalog.current_setting('lock_timeout'), \
         EXISTS(SELECT FROM {rows} WHERE CASE WHEN {attempt} THEN false{cut_short} ELSE \
         pg_catalog.set_config('lock_timeout', greatest(1, pg_catalog.int8mi('{millis}', pg_catalog.numeric_mul(\
         extract(epoch FROM pg_catalog.timestamptz_mi(pg_catalog.clock_timestamp(), \
         pg_catalog.statement_timestamp())), 1000)::bigint))::pg_catalog.text, true) IS NULL OR {wait} END)), true)"
    )
}

/// [`begin`](super::begin) with several locks.
pub(in crate::postgres) fn begin_all(keys: &[PostgresKey], mode: Mode, millis: u32) -> String {
    let take = take_in_transaction(keys, mode, millis, true);
    format!(
        "BEGIN; SELECT CASE WHEN {HAS_OWN_LOCKS} THEN {IS_STANDBY}::pg_catalog.text WHEN \
         pg_catalog.textne(pg_catalog.current_setting('transaction_isolation'), 'read committed') \
         THEN pg_catalog.current_setting('transaction_isolation')::pg_catalog.json::pg_catalog.text ELSE {take} END"
    )
}

/// Takes locks of the open transaction.
pub(in crate::postgres) fn wait_all(keys: &[PostgresKey], mode: Mode, millis: u32) -> String {
    let take = take_in_transaction(keys, mode, millis, false);
    format!("SELECT {take}")
}

/// Begins a transaction and makes the locks that the session holds that transaction's.
pub(in crate::postgres) fn begin_and_hand_over(keys: &[PostgresKey], mode: Mode) -> String {
    let list = List::new(keys);
    let take = list.call("pg_advisory_xact_lock", mode, " IS NULL");
    format!(
        "BEGIN; SELECT EXISTS(SELECT FROM {} WHERE {take}), {}",
        list.rows(),
        unlock_all_text(keys, mode)
    )
}
