//! One session of a PostgreSQL server, as far as a lock goes: all that can come of each message. It knows the texts and
//! the server, and nothing of the machines.
//!
//! A message is read statement by statement. Each may fail before it has done anything; one that takes or releases a
//! session's lock may also fail afterwards, because a cancel arrived then. What a failure undoes and what it leaves is
//! PostgreSQL's: settings, savepoints and a transaction's locks are undone, a session's locks are not.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use dlock_core::proto::{Answer, Bind, Columns, Prepared, Rows, Statement, Step};

use crate::script::{deadlock, detail, held_up, lost, out_of_memory, plain, token, version};

/// The key that all conversations are about, and its mode is exclusive.
pub(crate) const KEY: i64 = 42;

/// What dlock sends, without `pg_catalog.`; `{}` stands for a number or a name.
mod text {
    pub(super) const ACQUIRE_FIRST: &str = "SELECT WHERE NOT CASE WHEN (pg_is_in_recovery() OR texteq(current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) \
        THEN false WHEN pg_try_advisory_lock(?) THEN true \
        WHEN textne(current_setting('transaction_timeout', true), '0') THEN false \
        ELSE set_config('lock_timeout', format('%s', current_setting('lock_timeout'), \
        set_config('lock_timeout', '900', true), pg_advisory_xact_lock($1), pg_sleep(0)), true) IS NOT NULL \
        AND pg_advisory_lock($1) IS NOT NULL END";
    pub(super) const ACQUIRE_LIMITED: &str = "SELECT WHERE NOT CASE WHEN (pg_is_in_recovery() OR texteq(current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) \
        THEN false WHEN pg_try_advisory_lock(?) THEN true \
        WHEN ? IS NULL OR textne(current_setting('transaction_timeout', true), '0') THEN false \
        ELSE set_config('lock_timeout', format('%s', current_setting('lock_timeout'), \
        set_config('lock_timeout', $2, true), pg_advisory_xact_lock($1), pg_sleep(0)), true) IS NOT NULL \
        AND pg_advisory_lock($1) IS NOT NULL END";
    pub(super) const TRY_ACQUIRE: &str = "SELECT CASE WHEN (pg_is_in_recovery() OR texteq(current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) \
        THEN 3::bigint ELSE 0 END WHERE NOT CASE WHEN ? IS NULL OR (pg_is_in_recovery() OR texteq(current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) \
        THEN false ELSE pg_try_advisory_lock($1) END";
    pub(super) const DROPPABLE: &str = "SELECT CASE WHEN (pg_is_in_recovery() OR texteq(current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) \
        THEN 3::bigint ELSE 0 END WHERE NOT CASE WHEN ? IS NULL THEN pg_advisory_unlock(?) \
        WHEN (pg_is_in_recovery() OR texteq(current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) \
        THEN false WHEN CASE WHEN pg_try_advisory_lock($2) THEN true \
        WHEN starts_with($1, '0') OR textne(current_setting('transaction_timeout', true), '0') THEN false \
        ELSE set_config('lock_timeout', format('%s', current_setting('lock_timeout'), \
        set_config('lock_timeout', $1, true), pg_advisory_xact_lock($2), pg_sleep(0)), true) IS NOT NULL \
        AND pg_advisory_lock($2) IS NOT NULL END \
        THEN set_config('dlock.granted', $1, false) IS NOT NULL ELSE false END";
    pub(super) const UNLOCK: &str = "SELECT WHERE NOT pg_advisory_unlock(?)";
    pub(super) const TRY_IN_TRANSACTION: &str = "SELECT (CASE WHEN (pg_is_in_recovery() OR texteq(current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) THEN 3 \
        ELSE pg_try_advisory_xact_lock(?)::int END)::bigint";
    pub(super) const IS_HELD: &str = "SELECT (EXISTS(SELECT FROM pg_locks l WHERE texteq(l.locktype, 'advisory') \
        AND int8eq(l.classid::bigint, ?) AND int8eq(l.objid::bigint, ?) AND int24eq(l.objsubid, ?) \
        AND int4eq(l.pid, pg_backend_pid()) AND l.granted AND texteq(l.mode, 'ExclusiveLock')))::int::bigint";
    pub(super) const VERIFY: &str = "SELECT (EXISTS(SELECT FROM pg_locks l WHERE texteq(l.locktype, 'advisory') \
        AND int8eq(l.classid::bigint, ?) AND int8eq(l.objid::bigint, ?) AND int24eq(l.objsubid, ?) \
        AND int4eq(l.pid, pg_backend_pid()) AND l.granted AND texteq(l.mode, 'ExclusiveLock'))::int \
        OPERATOR(+) CASE WHEN EXISTS(SELECT FROM pg_prepared_statements p WHERE \
        int4gt(strpos(p.statement, ?), 0)) THEN 0 ELSE 2 END)::bigint";
    pub(super) const PREPARE_TURN: &str = "SELECT (CASE WHEN set_config('dlock.high', $1::text, false) IS NOT NULL \
        AND set_config('dlock.low', $2::text, false) IS NOT NULL \
        AND set_config('dlock.millis', t.millis::text, false) IS NOT NULL \
        AND EXISTS(SELECT FROM pg_language l WHERE nameeq(l.lanname, 'plpgsql') \
        AND has_language_privilege(l.oid, 'USAGE')) THEN t.millis ELSE int8um(t.millis) END)::bigint \
        FROM (SELECT least($4, greatest(numeric_mul(extract(epoch FROM \
        current_setting('deadlock_timeout')::interval), CASE WHEN EXISTS(SELECT FROM pg_locks l \
        WHERE int4eq(l.pid, pg_backend_pid()) AND l.granted AND textne(l.locktype, 'virtualxid') AND \
        int8ge(coalesce(l.relation::bigint, 16384), 16384)) THEN 1800 ELSE 900 END)::bigint, \
        CASE WHEN EXISTS(SELECT FROM pg_locks l WHERE texteq(l.locktype, 'advisory') \
        AND int8eq(l.classid::bigint, $1) AND int8eq(l.objid::bigint, $2) AND int24eq(l.objsubid, $3) \
        AND l.granted AND texteq(l.mode, 'ShareLock')) THEN $5 ELSE 1 END)) AS millis OFFSET 0) t \
        /* ?, ?, ?, ?, ? */";
    pub(super) const PROBE: &str = "SELECT (CASE WHEN textne(current_setting('statement_timeout'), '0') \
        AND interval_le(current_setting('statement_timeout')::interval, textcat($1::text, 'ms')::interval) THEN 2 \
        WHEN pg_try_advisory_xact_lock($2) IS NOT NULL THEN 1 END)::bigint /* ?, ? */";
    pub(super) const READ_UNLOCKED: &str = "SELECT current_setting('dlock.unlocked')::bigint";

    pub(super) const LIMITS: &str = "SELECT set_config('dlock.lock_timeout', current_setting('lock_timeout'), true), \
        set_config('dlock.statement_timeout', current_setting('statement_timeout'), true), \
        set_config('dlock.check_interval', current_setting('client_connection_check_interval'), true), \
        set_config('lock_timeout', '{}', true), set_config('statement_timeout', '0', true), \
        CASE WHEN (pg_is_in_recovery() OR texteq(current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) THEN concat('dlock_standby')::json::text END";
    pub(super) const AND_TRANSACTION: &str = ", set_config('dlock.transaction_timeout', \
        coalesce(current_setting('transaction_timeout', true), '0'), true), \
        CASE WHEN textne(current_setting('transaction_timeout', true), '0') \
        THEN set_config('transaction_timeout', '0', true) END";
    pub(super) const PUT_BACK: &str = "SELECT set_config('lock_timeout', current_setting('dlock.lock_timeout'), true), \
        set_config('statement_timeout', current_setting('dlock.statement_timeout'), true), \
        CASE WHEN textne(current_setting('client_connection_check_interval'), current_setting('dlock.check_interval')) \
        THEN set_config('client_connection_check_interval', current_setting('dlock.check_interval'), true) END";
    pub(super) const PUT_BACK_TRANSACTION: &str = ", CASE WHEN textne(current_setting('dlock.transaction_timeout'), '0') \
        THEN set_config('transaction_timeout', current_setting('dlock.transaction_timeout'), true) END";
    pub(super) const WATCH_CLIENT: &str = "DO $dlock$ BEGIN PERFORM set_config('client_connection_check_interval', '200ms', true); \
        EXCEPTION WHEN OTHERS THEN NULL; END $dlock$";
    pub(super) const TURN: &str = "DO $dlock$ DECLARE got bool := false; detail text; BEGIN BEGIN \
        PERFORM set_config('lock_timeout', current_setting('dlock.millis'), true); \
        PERFORM pg_advisory_xact_lock(int8or(int8shl(current_setting('dlock.high')::bigint, 32), \
        current_setting('dlock.low')::bigint)); got := true; \
        EXCEPTION WHEN lock_not_available THEN NULL; \
        WHEN deadlock_detected THEN GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL; \
        IF textregexne(detail, '[0-9]/[0-9]') OR timestamptz_ne(now(), statement_timestamp()) THEN RAISE; END IF; END;";
    pub(super) const TURN_OF_SESSION: &str = " IF got THEN PERFORM pg_advisory_lock(int8or(int8shl(\
        current_setting('dlock.high')::bigint, 32), current_setting('dlock.low')::bigint)); END IF;";
    pub(super) const TELL_TURN: &str = "SELECT set_config('dlock.high', '0', true), \
        set_config('dlock.low', '42', true), set_config('dlock.millis', '{}', true)";
    pub(super) const WAIT: &str = "SELECT pg_advisory_xact_lock('42'::bigint)";
    pub(super) const WAIT_OF_SESSION: &str = ", pg_sleep(0), pg_advisory_lock('42'::bigint)";
    pub(super) const TRY_OR_FAIL: &str = "SELECT CASE WHEN (pg_is_in_recovery() OR texteq(current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) OR current_setting('crdb_version', true) IS NOT NULL THEN concat('dlock_standby')::json::text WHEN pg_try_advisory_lock('42'::bigint) THEN '' ELSE concat('dlock_taken')::json::text END";
    pub(super) const PROBE_INSIDE: &str = "SELECT pg_try_advisory_xact_lock('{}')";
    pub(super) const LEAVE_MARK: &str = "SELECT set_config('dlock.granted', '{}', false)";
    pub(super) const HAND_OVER: &str =
        "SELECT pg_advisory_xact_lock('42'::bigint), pg_advisory_unlock('42'::bigint)";
    pub(super) const UNLOCK_AND_KEEP: &str =
        "SELECT set_config('dlock.unlocked', pg_advisory_unlock('42'::bigint)::int::text, true)";
    pub(super) const UNLOCK_AND_FAIL: &str = "SELECT (CASE WHEN pg_advisory_unlock('42'::bigint) \
        THEN 'dlock_released' ELSE 'dlock_not_held' END)::json";
    pub(super) const UNLOCK_UNREAD: &str = "SELECT pg_advisory_unlock('42'::bigint)";
    pub(super) const NO_STATEMENT_TIMEOUT: &str =
        "SELECT set_config('statement_timeout', '0', true)";
    pub(super) const LIMITS_OF: &str = "SELECT set_config('statement_timeout', '0', true), set_config('lock_timeout', '{}', true), \
        CASE WHEN textne(current_setting('transaction_timeout', true), '0') \
        THEN set_config('transaction_timeout', '0', true) END";
    pub(super) const RELEASE_IF_GRANTED: &str = "SELECT WHERE NOT CASE WHEN \
        texteq(current_setting('dlock.granted', true), '{}') AND set_config('dlock.granted', '', false) IS NOT NULL \
        THEN pg_advisory_unlock('42'::bigint) IS NOT NULL ELSE true END";
    pub(super) const RECLAIM: &str = "SELECT CASE WHEN EXISTS(SELECT FROM pg_locks l WHERE \
        texteq(l.locktype, 'advisory') AND int8eq(l.classid::bigint, 0) AND int8eq(l.objid::bigint, 42) \
        AND int24eq(l.objsubid, 1) AND int4eq(l.pid, pg_backend_pid()) AND l.granted \
        AND texteq(l.mode, 'ExclusiveLock')) THEN pg_advisory_unlock('42'::bigint) END";
    pub(super) const BEGIN_OR_FAIL: &str = "SELECT query_to_xml($dlock$SELECT WHERE CASE \
        WHEN (pg_is_in_recovery() OR texteq(current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) THEN concat('dlock_standby')::json IS NULL \
        WHEN texteq(current_setting('transaction_isolation'), 'read committed') \
        THEN concat('dlock_taken')::json IS NULL \
        ELSE current_setting('transaction_isolation')::json IS NULL END$dlock$, true, true, '') WHERE NOT CASE WHEN (pg_is_in_recovery() OR texteq(current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) THEN false \
        WHEN texteq(current_setting('transaction_isolation'), 'read committed') \
        THEN pg_try_advisory_xact_lock('42'::bigint) ELSE false END";
    pub(super) const BEGIN_OR_WAIT: &str = "SELECT query_to_xml($dlock$SELECT WHERE CASE \
        WHEN (pg_is_in_recovery() OR texteq(current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) THEN concat('dlock_standby')::json IS NULL \
        WHEN texteq(current_setting('transaction_isolation'), 'read committed') \
        THEN CASE WHEN textne(current_setting('transaction_timeout', true), '0') \
        THEN concat('dlock_cut_short')::json IS NULL \
        ELSE set_config('lock_timeout', format('%s', current_setting('lock_timeout'), \
        set_config('lock_timeout', '{}', true), pg_advisory_xact_lock('42'::bigint)), true) IS NULL END \
        ELSE current_setting('transaction_isolation')::json IS NULL END$dlock$, true, true, '') WHERE NOT CASE WHEN (pg_is_in_recovery() OR texteq(current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) THEN false \
        WHEN texteq(current_setting('transaction_isolation'), 'read committed') \
        THEN pg_try_advisory_xact_lock('42'::bigint) ELSE false END";
}

/// How long a lock lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    Session,
    Transaction,
}

/// A statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Does {
    Begin,
    Commit,
    RollBack,
    Savepoint(String),
    BackTo(String),
    Release(String),
    NoStatementTimeout,
    /// Without putting them back: they end with the transaction.
    LimitsOf(u32),
    Limits {
        millis: u32,
        transaction: bool,
    },
    PutBack {
        transaction: bool,
    },
    WatchClient,
    Wait(Scope),
    Turn(Scope),
    Acquire {
        mark: i64,
        millis: u32,
    },
    TryOrFail,
    BeginOrWait {
        millis: u32,
    },
    TryInTransaction,
    Unlock,
    /// By the statement that acquires what may be dropped.
    UnlockDroppable,
    UnlockAndKeep,
    UnlockAndFail,
    ReadUnlocked,
    LeaveMark(i64),
    ReleaseIfGranted(i64),
    Reclaim,
    HandOver,
    IsHeld,
    Verify,
    PrepareTurn {
        rest: u32,
        long: u32,
    },
    Probe {
        passed: i64,
    },
    ProbeInside,
    Holders,
    /// What the server calls itself.
    Version,
    UnlockAll,
    EndSession,
    Nothing,
    /// The key, and how long a turn is.
    TellTurn(u32),
}

/// A message.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) statements: Vec<Does>,
    /// A piece of the prepared statement that it relies on. The session may have forgotten it.
    prepared: Option<String>,
    /// The one that it asks about.
    failed: Option<String>,
    rows: bool,
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.statements)
    }
}

impl Message {
    /// `None` for what is not sent. The savepoint of the conversation is called `own` here, whatever its number.
    pub(crate) fn of<T>(step: &Step<T>, own: Option<&str>) -> Option<Message> {
        match step {
            Step::Query(statement) => {
                let does = Does::of_statement(statement);
                let failed = match (&does, statement.binds.iter().last()) {
                    (Does::Verify, Some(Bind::Text(text))) => Some(text.clone()),
                    _ => None,
                };
                Some(Message {
                    statements: vec![does],
                    prepared: match statement.prepared {
                        Prepared::ByText | Prepared::Never => None,
                        _ => statement.sql.last().map(|text| (*text).to_owned()),
                    },
                    failed,
                    rows: true,
                })
            }
            Step::Batch(text) => Some(Message::of_text(text, own)),
            Step::Sleep(_) | Step::Tell(_) => None,
            Step::Done(_) => panic!("over"),
        }
    }

    pub(crate) fn of_text(text: &str, own: Option<&str>) -> Message {
        let text = text.replace("pg_catalog.", "");
        let mut statements = Vec::new();
        let mut block = String::new();
        for part in text.split("; ") {
            block.push_str(part);
            if block.matches("$dlock$").count() % 2 == 1 {
                block.push_str("; ");
                continue;
            }
            statements.push(Does::of_text(&block, own));
            block.clear();
        }
        assert!(block.is_empty(), "unfinished: {block}");
        Message {
            statements,
            prepared: None,
            failed: None,
            rows: false,
        }
    }

    /// How long it may wait in the queue, if it may: 0 without a limit. A quiet turn has a limit of its own.
    pub(crate) fn waits(&self) -> Option<u32> {
        let mut limit = 0;
        for statement in &self.statements {
            match statement {
                Does::LimitsOf(millis) | Does::Limits { millis, .. } => limit = *millis,
                Does::Wait(_) | Does::Turn(_) => return Some(limit),
                Does::Acquire { mark: _, millis } | Does::BeginOrWait { millis } if *millis > 0 => {
                    return Some(*millis);
                }
                _ => {}
            }
        }
        None
    }

    /// Whether it asks for the lock.
    pub(crate) fn asks(&self) -> bool {
        self.statements.iter().any(|statement| {
            matches!(
                statement,
                Does::Acquire { .. }
                    | Does::TryOrFail
                    | Does::BeginOrWait { .. }
                    | Does::TryInTransaction
                    | Does::Wait(_)
                    | Does::Turn(_)
            )
        })
    }

    /// Whether its transaction is no older than itself.
    fn begins(&self) -> bool {
        let begins = |statement: &Does| matches!(statement, Does::Begin | Does::Commit);
        self.statements.iter().any(begins)
    }

    /// Whether it ends its turn without an error, so that the server's log gets no line.
    pub(crate) fn is_quiet(&self) -> bool {
        let is_turn = |statement: &Does| matches!(statement, Does::Turn(_));
        self.statements.iter().any(is_turn)
    }

    /// Answers that the server never gives to it.
    pub(crate) fn strange_answers(&self) -> impl Iterator<Item = Says> {
        let strange: &[Says] = match (self.rows, self.statements.as_slice()) {
            // If even that is not understood, nobody knows what is aborted.
            _ if self.is_undo() => &[],
            (false, _) => &[Says::Number(1), Says::Null, Says::Holders],
            (true, [Does::Holders]) => &[Says::Number(1), Says::Done],
            (true, [Does::PrepareTurn { .. }]) => &[Says::Null, Says::Done, Says::Holders],
            (true, _) => &[
                Says::Number(7),
                Says::Number(-1),
                Says::Null,
                Says::Done,
                Says::Holders,
            ],
        };
        strange.iter().copied()
    }

    fn is_undo(&self) -> bool {
        matches!(self.statements.as_slice(), [Does::BackTo(back), Does::Release(gone)] if back == gone)
    }
}

/// What stands for each `{}` of the pattern.
fn matches<'t>(text: &'t str, pattern: &str) -> Option<Vec<&'t str>> {
    let mut parts = pattern.split("{}");
    let mut rest = text.strip_prefix(parts.next()?)?;
    let mut found = Vec::new();
    for part in parts {
        let is_word = |letter: char| letter.is_ascii_alphanumeric() || "_-.".contains(letter);
        let end = rest.find(|letter| !is_word(letter)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        found.push(word);
        rest = after.strip_prefix(part)?;
    }
    rest.is_empty().then_some(found)
}

/// A number for a mark.
fn mark_of(text: &str) -> i64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish() as i64
}

fn number<N: std::str::FromStr<Err: std::fmt::Debug>>(found: &[&str]) -> N {
    found[0].parse().unwrap()
}

impl Does {
    fn of_statement(statement: &Statement) -> Does {
        let sql = statement.text().replace("pg_catalog.", "");
        let binds: Vec<_> = statement.binds.iter().collect();
        let big = |at: usize| match binds[at] {
            Bind::BigInt(number) => *number,
            Bind::Integer(number) => (*number).into(),
            other => panic!("not a number: {other:?}"),
        };
        let millis = |at| u32::try_from(big(at)).unwrap();
        let row = [Bind::BigInt(0), Bind::BigInt(KEY), Bind::Integer(1)];
        let is_row = |binds: &[&Bind]| assert!(binds.iter().copied().eq(&row), "{binds:?}");
        if statement.columns == Columns::Holders {
            is_row(&binds);
            return Does::Holders;
        }
        if sql == "SELECT version()" {
            assert_eq!(statement.columns, Columns::Text);
            return Does::Version;
        }
        // NULL where it releases.
        let mark = match binds.first() {
            Some(Bind::Text(mark)) => Some(mark.as_str()),
            _ => None,
        };
        let limit = |text: &str| text.split('.').next().unwrap().parse::<u32>().unwrap();
        // No row is the number 1. A machine that waits does not read one.
        let columns = match sql.as_str() {
            text::ACQUIRE_FIRST | text::ACQUIRE_LIMITED | text::UNLOCK => Columns::AnyRow,
            text::DROPPABLE if mark.map(limit) != Some(0) => Columns::AnyRow,
            text::DROPPABLE | text::TRY_ACQUIRE => Columns::NoRow,
            _ => Columns::Number,
        };
        assert_eq!(statement.columns, columns);
        match sql.as_str() {
            text::ACQUIRE_FIRST => {
                assert_eq!(big(0), KEY);
                Does::Acquire {
                    mark: 0,
                    millis: 900,
                }
            }
            text::ACQUIRE_LIMITED => {
                assert_eq!(big(0), KEY);
                let Bind::Text(millis) = binds[1] else {
                    panic!("no limit: {:?}", binds[1])
                };
                Does::Acquire {
                    mark: 0,
                    millis: millis.parse().unwrap(),
                }
            }
            text::TRY_ACQUIRE => {
                assert_eq!(big(0), KEY);
                Does::Acquire { mark: 0, millis: 0 }
            }
            text::DROPPABLE => {
                assert_eq!(big(1), KEY);
                match (mark, binds[0]) {
                    (Some(text), _) => Does::Acquire {
                        mark: mark_of(text),
                        millis: limit(text),
                    },
                    (None, Bind::NoText) => Does::UnlockDroppable,
                    (None, other) => panic!("not a mark: {other:?}"),
                }
            }
            text::UNLOCK => {
                assert_eq!(big(0), KEY);
                Does::Unlock
            }
            text::TRY_IN_TRANSACTION => {
                assert_eq!(big(0), KEY);
                Does::TryInTransaction
            }
            text::IS_HELD => {
                is_row(&binds);
                Does::IsHeld
            }
            text::VERIFY => {
                is_row(&binds[..3]);
                assert_eq!(statement.prepared, Prepared::Never);
                Does::Verify
            }
            text::PREPARE_TURN => {
                is_row(&binds[..3]);
                Does::PrepareTurn {
                    rest: millis(3),
                    long: millis(4),
                }
            }
            text::PROBE => {
                assert_ne!(big(1), KEY);
                Does::Probe { passed: big(0) }
            }
            text::READ_UNLOCKED => Does::ReadUnlocked,
            _ => panic!("unknown: {sql}"),
        }
    }

    fn of_text(sql: &str, own: Option<&str>) -> Does {
        let is = |pattern: &str| matches(sql, pattern);
        let named = |found: Vec<&str>| match found[0] {
            name if Some(name) == own => "own".to_owned(),
            name => name.to_owned(),
        };
        let end_of_block = " END $dlock$";
        match sql {
            "BEGIN" => return Does::Begin,
            "COMMIT AND CHAIN" => return Does::Commit,
            "ROLLBACK" => return Does::RollBack,
            "RESET SESSION AUTHORIZATION" | "SET ROLE NONE" | "SELECT 1" => return Does::Nothing,
            "SELECT pg_advisory_unlock_all()" => return Does::UnlockAll,
            "SELECT pg_terminate_backend(pg_backend_pid())"
            | "SELECT set_config('idle_session_timeout', '1', false)" => return Does::EndSession,
            text::NO_STATEMENT_TIMEOUT => return Does::NoStatementTimeout,
            text::WATCH_CLIENT => return Does::WatchClient,
            text::WAIT => return Does::Wait(Scope::Transaction),
            text::TRY_OR_FAIL => return Does::TryOrFail,
            text::HAND_OVER => return Does::HandOver,
            text::UNLOCK_AND_KEEP => return Does::UnlockAndKeep,
            text::UNLOCK_AND_FAIL => return Does::UnlockAndFail,
            text::UNLOCK_UNREAD => return Does::Unlock,
            text::RECLAIM => return Does::Reclaim,
            text::BEGIN_OR_FAIL => return Does::BeginOrWait { millis: 0 },
            _ => {}
        }
        if let Some(found) = is("SAVEPOINT {}") {
            Does::Savepoint(named(found))
        } else if let Some(found) = is("ROLLBACK TO SAVEPOINT {}") {
            Does::BackTo(named(found))
        } else if let Some(found) = is("RELEASE SAVEPOINT {}") {
            Does::Release(named(found))
        } else if let Some(found) = is(text::LIMITS_OF) {
            Does::LimitsOf(number(&found))
        } else if let Some(found) = is(text::TELL_TURN) {
            Does::TellTurn(number(&found))
        } else if let Some(found) = is(text::LIMITS) {
            Does::Limits {
                millis: number(&found),
                transaction: false,
            }
        } else if let Some(found) = is(&[text::LIMITS, text::AND_TRANSACTION].concat()) {
            Does::Limits {
                millis: number(&found),
                transaction: true,
            }
        } else if sql == text::PUT_BACK {
            Does::PutBack { transaction: false }
        } else if sql == [text::PUT_BACK, text::PUT_BACK_TRANSACTION].concat() {
            Does::PutBack { transaction: true }
        } else if sql == [text::TURN, text::TURN_OF_SESSION, end_of_block].concat() {
            Does::Turn(Scope::Session)
        } else if sql == [text::TURN, end_of_block].concat() {
            Does::Turn(Scope::Transaction)
        } else if sql == [text::WAIT, text::WAIT_OF_SESSION].concat() {
            Does::Wait(Scope::Session)
        } else if let Some(found) = is(text::PROBE_INSIDE) {
            assert_ne!(number::<i64>(&found), KEY);
            Does::ProbeInside
        } else if let Some(found) = is(text::LEAVE_MARK) {
            Does::LeaveMark(mark_of(found[0]))
        } else if let Some(found) = is(text::RELEASE_IF_GRANTED) {
            Does::ReleaseIfGranted(mark_of(found[0]))
        } else if let Some(found) = is(text::BEGIN_OR_WAIT) {
            Does::BeginOrWait {
                millis: number(&found),
            }
        } else {
            panic!("unknown: {sql}")
        }
    }

    /// Obeyed where the transaction is aborted.
    fn ends_what_is_aborted(&self) -> bool {
        matches!(self, Does::RollBack | Does::Commit | Does::BackTo(_))
    }
}

/// What the server says of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Says {
    Done,
    Number(i64),
    Null,
    Holders,
    /// PostgreSQL's own.
    Version,
    /// An error without a DETAIL: a lock timeout, a cancel, an aborted transaction.
    Plain,
    Detail,
    Deadlock,
    HeldUp,
    OutOfMemory,
    Token(&'static str),
    Lost,
}

impl Says {
    pub(crate) fn answer(self) -> Answer {
        match self {
            Says::Done => Answer::Done,
            Says::Number(number) => Answer::Rows(Rows::Number(Some(number))),
            Says::Null => Answer::Rows(Rows::Number(None)),
            Says::Holders => Answer::Rows(Rows::Holders(Vec::new())),
            Says::Version => version("PostgreSQL 17.2 on x86_64-pc-linux-gnu"),
            Says::Plain => plain(),
            Says::Detail => detail("A detail in any language."),
            Says::Deadlock => deadlock(),
            Says::HeldUp => held_up(),
            Says::OutOfMemory => out_of_memory(),
            Says::Token(text) => token(text),
            Says::Lost => lost(),
        }
    }

    pub(crate) fn is_error(self) -> bool {
        !matches!(
            self,
            Says::Done | Says::Number(_) | Says::Null | Says::Holders | Says::Version
        )
    }
}

/// What does not change while a conversation lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Surroundings {
    pub(crate) plpgsql: bool,
    pub(crate) isolated: bool,
    pub(crate) transaction_timeout: bool,
    /// Its locks are its own.
    pub(crate) standby: bool,
    /// In milliseconds; 0 if it is not set.
    pub(crate) statement_timeout: u32,
    /// The session has forgotten its prepared statements and the driver does not know (`DEALLOCATE ALL`).
    pub(crate) forgotten: bool,
    /// The driver keeps no prepared statements (`CacheSize::Disabled`), so the session never has one with a name.
    pub(crate) unnamed: bool,
}

pub(crate) const USUAL: Surroundings = Surroundings {
    plpgsql: true,
    isolated: false,
    transaction_timeout: false,
    standby: false,
    statement_timeout: 0,
    forgotten: false,
    unnamed: false,
};

/// Which settings are not the user's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Settings {
    lock_timeout: Option<u32>,
    statement_timeout: bool,
    transaction_timeout: bool,
    check_interval: bool,
}

/// What a rollback undoes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Undoable {
    settings: Settings,
    /// `dlock.granted`.
    mark: i64,
    /// `dlock.unlocked`.
    unlocked: Option<bool>,
    /// `dlock.millis`.
    turn: u32,
    /// Whether the transaction has the lock.
    transaction_holds: bool,
}

impl Undoable {
    /// What does not end with the transaction.
    fn of_session(self) -> Undoable {
        Undoable {
            mark: self.mark,
            turn: self.turn,
            ..Undoable::default()
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Transaction {
    aborted: bool,
    begun: Undoable,
    savepoints: Vec<(String, Undoable)>,
}

/// The session.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Session {
    /// How often it holds the lock.
    pub(crate) holds: u32,
    pub(crate) ended: bool,
    surroundings: Surroundings,
    now: Undoable,
    transaction: Option<Transaction>,
    /// The prepared statements that it knows, by a piece of each.
    prepared: Vec<String>,
    /// It knows all of them.
    knows_all: bool,
    /// The undo has failed once. It does not fail again: that would be the third cancel in a row.
    undo_failed: bool,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ended {
            return f.write_str("ended");
        }
        let Undoable {
            settings,
            mark,
            unlocked,
            turn,
            transaction_holds,
        } = self.now;
        write!(f, "holds {}", self.holds)?;
        match &self.transaction {
            None => f.write_str(", no transaction")?,
            Some(_) => {
                let aborted = if self.is_aborted() { ", aborted" } else { "" };
                write!(f, ", transaction {:?}{aborted}", self.savepoints())?;
            }
        }
        if transaction_holds {
            f.write_str(", it has the lock")?;
        }
        if settings != Settings::default() {
            write!(f, ", {settings:?}")?;
        }
        write!(
            f,
            ", mark {mark}, unlocked {unlocked:?}, turn {turn}, prepared {:?}",
            self.prepared
        )?;
        if self.surroundings != USUAL {
            write!(f, ", {:?}", self.surroundings)?;
        }
        Ok(())
    }
}

/// What may come of a message.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Reply {
    pub(crate) says: Says,
    pub(crate) took: Duration,
    pub(crate) session: Session,
    /// Whether something had to go wrong for that.
    pub(crate) fault: bool,
}

/// What may come of a statement.
struct Ran {
    said: Result<Option<i64>, Says>,
    session: Session,
    /// In milliseconds; 0 for at once.
    took: u32,
    fault: bool,
}

impl Session {
    pub(crate) fn new(surroundings: Surroundings, holds: u32) -> Self {
        Session {
            holds,
            ended: false,
            surroundings,
            now: Undoable::default(),
            transaction: None,
            prepared: Vec::new(),
            knows_all: false,
            undo_failed: false,
        }
    }

    /// In an open transaction with these savepoints.
    pub(crate) fn open(mut self, savepoints: &[&str]) -> Self {
        let begun = self.now;
        self.transaction = Some(Transaction {
            aborted: false,
            begun,
            savepoints: savepoints
                .iter()
                .map(|&name| (name.into(), begun))
                .collect(),
        });
        self
    }

    pub(crate) fn aborted(mut self) -> Self {
        self.abort();
        self
    }

    /// By default its transactions are at REPEATABLE READ.
    pub(crate) fn isolated(mut self) -> Self {
        self.surroundings.isolated = true;
        self
    }

    /// It has executed a prepared statement of dlock.
    pub(crate) fn prepared(mut self) -> Self {
        self.knows_all = !self.surroundings.forgotten && !self.surroundings.unnamed;
        self
    }

    /// What it grants excludes nobody.
    pub(crate) fn is_on_a_standby(&self) -> bool {
        self.surroundings.standby
    }

    pub(crate) fn is_open(&self) -> bool {
        self.transaction.is_some()
    }

    pub(crate) fn is_aborted(&self) -> bool {
        self.transaction
            .as_ref()
            .is_some_and(|transaction| transaction.aborted)
    }

    pub(crate) fn transaction_holds(&self) -> bool {
        self.now.transaction_holds
    }

    pub(crate) fn settings_are_the_users(&self) -> bool {
        self.now.settings == Settings::default()
    }

    pub(crate) fn savepoints(&self) -> Vec<&str> {
        let savepoints = self.transaction.iter().flat_map(|open| &open.savepoints);
        savepoints.map(|(name, _)| name.as_str()).collect()
    }

    /// The driver committed or rolled back.
    pub(crate) fn after_transaction(mut self) -> Self {
        self.roll_back();
        self
    }

    fn holds(&self) -> bool {
        self.holds > 0 || self.now.transaction_holds
    }

    fn abort(&mut self) {
        if let Some(transaction) = &mut self.transaction {
            transaction.aborted = true;
        }
    }

    fn roll_back(&mut self) {
        if let Some(transaction) = self.transaction.take() {
            self.now = transaction.begun;
        }
    }

    fn lost(&self) -> Session {
        Session {
            ended: true,
            ..Session::new(self.surroundings, 0)
        }
    }

    /// All that may come of a message.
    pub(crate) fn receive(&self, message: &Message) -> Vec<Reply> {
        let mut replies = Vec::new();
        let mut reply = |says, took, session, fault| {
            let reply = Reply {
                says,
                took,
                session,
                fault,
            };
            if !replies.contains(&reply) {
                replies.push(reply);
            }
        };
        if self.ended {
            reply(Says::Lost, AT_ONCE, self.clone(), false);
            return replies;
        }
        reply(Says::Lost, AT_ONCE, self.lost(), true);
        let certainly_undone = message.is_undo() && self.undo_failed;
        let alone = self.transaction.is_none();
        let limit = match message.waits() {
            Some(_) if message.is_quiet() => self.now.turn,
            limit => limit.unwrap_or(0),
        };

        let fail = |mut session: Session| {
            match session.transaction {
                Some(_) => session.abort(),
                None if alone => session.now = self.now,
                None => {}
            }
            session.undo_failed = message.is_undo();
            session
        };

        if message.prepared.is_some() && self.surroundings.forgotten {
            reply(Says::Plain, AT_ONCE, fail(self.clone()), false);
            return replies;
        }

        let mut running = vec![self.clone()];
        running[0].undo_failed = false;
        let mut running: Vec<_> = running.into_iter().map(|session| (session, 0)).collect();
        let mut number = None;
        let mut ends = Vec::new();
        for (at, statement) in message.statements.iter().enumerate() {
            let mut next = Vec::new();
            for (session, before) in running {
                // Before it has done anything, whatever it is.
                if !certainly_undone {
                    ends.push((Says::Plain, 0, session.clone(), true));
                    // Too late for a wait that has ended with its limit.
                    if limit > 0 {
                        ends.push((Says::Plain, limit, session.clone(), true));
                    }
                }
                if session.is_aborted() && !statement.ends_what_is_aborted() {
                    ends.push((Says::Plain, 0, session, false));
                    continue;
                }
                for mut ran in session.run(statement, message) {
                    // It was prepared before it was executed.
                    ran.session.prepare(message);
                    match ran.said {
                        Err(says) => ends.push((says, ran.took, ran.session, ran.fault)),
                        Ok(said) => {
                            let entry = (said, ran.session, before + ran.took);
                            if !next.contains(&entry) {
                                next.push(entry);
                            }
                        }
                    }
                }
            }
            if at + 1 == message.statements.len() {
                number = Some(next);
                break;
            }
            running = next
                .into_iter()
                .map(|(_, session, took)| (session, took))
                .collect();
        }
        let after = |took: u32| Duration::from_millis(took.into()) + AT_ONCE;
        for (says, took, session, fault) in ends {
            let took = after(took);
            let session = if session.ended {
                session
            } else {
                fail(session)
            };
            reply(says, took, session, fault);
        }
        for (said, mut session, took) in number.into_iter().flatten() {
            if session.transaction.is_none() {
                session.now = session.now.of_session();
            }
            let says = match (message.rows, said) {
                (false, _) => Says::Done,
                (true, Some(number)) => Says::Number(number),
                (true, None) if message.statements == [Does::Holders] => Says::Holders,
                (true, None) if message.statements == [Does::Version] => Says::Version,
                (true, None) => Says::Null,
            };
            reply(says, after(took), session, false);
        }
        replies
    }

    fn run(&self, statement: &Does, message: &Message) -> Vec<Ran> {
        let mut all = Vec::new();
        let mut ran = |said, session: Session, took, fault| {
            all.push(Ran {
                said,
                session,
                took,
                fault,
            });
        };
        let mut session = self.clone();
        let with = |change: &dyn Fn(&mut Session)| {
            let mut session = self.clone();
            change(&mut session);
            session
        };
        match statement {
            Does::Nothing | Does::TellTurn(_) => ran(Ok(None), session, 0, false),
            Does::Begin => {
                if session.transaction.is_none() {
                    session = session.open(&[]);
                }
                ran(Ok(None), session, 0, false);
            }
            Does::Commit => {
                // AND CHAIN
                assert!(session.transaction.is_some(), "nothing to commit");
                if session.is_aborted() {
                    session.roll_back();
                }
                session.transaction = None;
                session.now = session.now.of_session();
                ran(Ok(None), session.open(&[]), 0, false);
            }
            Does::RollBack => {
                session.roll_back();
                ran(Ok(None), session, 0, false);
            }
            Does::Savepoint(name) => {
                let now = session.now;
                match &mut session.transaction {
                    None => ran(Err(Says::Plain), session, 0, false),
                    Some(transaction) => {
                        transaction.savepoints.push((name.clone(), now));
                        ran(Ok(None), session, 0, false);
                    }
                }
            }
            Does::BackTo(name) | Does::Release(name) => {
                let back = matches!(statement, Does::BackTo(_));
                let open = session.transaction.as_mut();
                let found = open.and_then(|transaction| {
                    let found = transaction
                        .savepoints
                        .iter()
                        .rposition(|(open, _)| open == name)?;
                    let then = transaction.savepoints[found].1;
                    transaction.savepoints.truncate(found + usize::from(back));
                    if back {
                        transaction.aborted = false;
                    }
                    Some(then)
                });
                match found {
                    None => ran(Err(Says::Plain), self.clone(), 0, false),
                    Some(then) => {
                        if back {
                            session.now = then;
                        }
                        ran(Ok(None), session, 0, false);
                    }
                }
            }
            Does::NoStatementTimeout => {
                session.now.settings.statement_timeout = true;
                ran(Ok(None), session, 0, false);
            }
            Does::LimitsOf(millis) => {
                session.now.settings.lock_timeout = Some(*millis);
                session.now.settings.statement_timeout = true;
                session.now.settings.transaction_timeout = true;
                ran(Ok(None), session, 0, false);
            }
            Does::Limits { .. } | Does::TryOrFail | Does::BeginOrWait { .. }
                if self.surroundings.standby =>
            {
                ran(Err(Says::Token("dlock_standby")), session, 0, false);
            }
            Does::Acquire { millis: 0, .. } | Does::TryInTransaction
                if self.surroundings.standby =>
            {
                ran(Ok(Some(3)), session, 0, false);
            }
            Does::Acquire { .. } if self.surroundings.standby => {
                ran(Ok(Some(0)), session, 0, false);
            }
            Does::Limits {
                millis,
                transaction,
            } => {
                session.now.settings.lock_timeout = Some(*millis);
                session.now.settings.statement_timeout = true;
                session.now.settings.transaction_timeout |= transaction;
                ran(Ok(None), session, 0, false);
            }
            Does::PutBack { transaction } => {
                let settings = session.now.settings;
                session.now.settings = Settings {
                    transaction_timeout: settings.transaction_timeout && !transaction,
                    ..Settings::default()
                };
                ran(Ok(None), session, 0, false);
            }
            Does::WatchClient => {
                session.now.settings.check_interval = true;
                ran(Ok(None), session, 0, false);
            }

            Does::Wait(scope) | Does::Turn(scope) => {
                let quiet = matches!(statement, Does::Turn(_));
                let limit = match quiet {
                    true => session.now.turn,
                    false => session
                        .now
                        .settings
                        .lock_timeout
                        .expect("a limit is set before a wait"),
                };
                let mut granted = session.clone();
                granted.now.transaction_holds = true;
                if quiet {
                    granted.now.settings.lock_timeout = Some(limit);
                }
                if *scope == Scope::Session {
                    granted.holds += 1;
                    // Before the lock of the session, and after it.
                    ran(Err(Says::Plain), granted.clone(), 0, true);
                    ran(Err(Says::Plain), granted.clone(), limit, true);
                    ran(Err(Says::Detail), granted.clone(), 0, true);
                }
                ran(Ok(None), granted.clone(), 0, false);
                if !session.holds() {
                    ran(Err(Says::OutOfMemory), session.clone(), 0, true);
                    ran(Err(Says::Deadlock), session.clone(), 0, true);
                    ran(Ok(None), granted, limit, false);
                    if quiet && session.transaction.is_some() && !message.begins() {
                        ran(Err(Says::HeldUp), session.clone(), 0, true);
                    }
                    if quiet {
                        let mut over = session.clone();
                        over.now.settings.lock_timeout = Some(limit);
                        ran(Ok(None), over, limit, false);
                    } else {
                        ran(Err(Says::HeldUp), session.clone(), 0, true);
                        if limit > 0 {
                            ran(Err(Says::Plain), session, limit, false);
                        }
                    }
                }
            }
            Does::Acquire { mark, millis } => {
                let granted = with(&|session| {
                    session.holds += 1;
                    if *mark != 0 {
                        session.now.mark = *mark;
                    }
                });
                let statement_timeout = match self.now.settings.statement_timeout {
                    true => 0,
                    false => self.surroundings.statement_timeout,
                };
                for failed in [&session, &granted] {
                    ran(Err(Says::Plain), failed.clone(), 0, true);
                    ran(Err(Says::Detail), failed.clone(), 0, true);
                    if *millis > 0 {
                        ran(Err(Says::Plain), failed.clone(), *millis, true);
                    }
                    if statement_timeout > 0 {
                        ran(Err(Says::Plain), failed.clone(), statement_timeout, true);
                    }
                }
                ran(Ok(Some(1)), granted, 0, false);
                if !session.holds() {
                    ran(Err(Says::OutOfMemory), session.clone(), 0, true);
                    if *millis == 0 || self.surroundings.transaction_timeout {
                        ran(Ok(Some(0)), session, 0, false);
                    } else {
                        let waited = with(&|session| {
                            session.holds += 1;
                            session.now.transaction_holds = true;
                            if *mark != 0 {
                                session.now.mark = *mark;
                            }
                        });
                        ran(Ok(Some(1)), waited, 0, false);
                        ran(Err(Says::Deadlock), session.clone(), 0, true);
                        ran(Err(Says::HeldUp), session.clone(), 0, true);
                        ran(Err(Says::Plain), session, *millis, false);
                    }
                }
            }
            Does::TryOrFail => {
                let granted = with(&|session| session.holds += 1);
                ran(Err(Says::Plain), granted.clone(), 0, true);
                ran(Ok(None), granted, 0, false);
                if !session.holds() {
                    ran(Err(Says::OutOfMemory), session.clone(), 0, true);
                    ran(Err(Says::Token("dlock_taken")), session, 0, false);
                }
            }
            Does::BeginOrWait { .. } if self.surroundings.isolated => {
                ran(Err(Says::Token("repeatable")), session, 0, false);
            }
            Does::BeginOrWait { millis } => {
                let granted = with(&|session| session.now.transaction_holds = true);
                ran(Ok(None), granted, 0, false);
                if !session.holds() {
                    ran(Err(Says::OutOfMemory), session.clone(), 0, true);
                    if *millis == 0 {
                        ran(Err(Says::Token("dlock_taken")), session, 0, false);
                    } else if self.surroundings.transaction_timeout {
                        ran(Err(Says::Token("dlock_cut_short")), session, 0, false);
                    } else {
                        let timeout = self.surroundings.statement_timeout;
                        if timeout > 0 {
                            ran(Err(Says::Plain), session.clone(), timeout, true);
                        }
                        ran(Err(Says::Deadlock), session.clone(), 0, true);
                        ran(Err(Says::HeldUp), session.clone(), 0, true);
                        ran(Err(Says::Plain), session, *millis, false);
                    }
                }
            }
            Does::TryInTransaction => {
                let granted = with(&|session| session.now.transaction_holds = true);
                ran(Ok(Some(1)), granted, 0, false);
                if !session.holds() {
                    ran(Err(Says::OutOfMemory), session.clone(), 0, true);
                    ran(Ok(Some(0)), session, 0, false);
                }
            }

            Does::Unlock | Does::UnlockDroppable => {
                let released = with(&Session::release);
                let number = i64::from(self.holds > 0);
                // Nothing can fail behind it: there is no row to send.
                ran(Ok(Some(number)), released, 0, false);
            }
            Does::UnlockAndKeep => {
                let released = with(&|session| {
                    session.now.unlocked = Some(session.holds > 0);
                    session.release();
                });
                ran(Ok(None), released.clone(), 0, false);
                ran(Err(Says::Plain), released, 0, true);
            }
            Does::UnlockAndFail => {
                let released = with(&Session::release);
                let token = match self.holds {
                    0 => "dlock_not_held",
                    _ => "dlock_released",
                };
                ran(Err(Says::Token(token)), released.clone(), 0, false);
                ran(Err(Says::Plain), released, 0, true);
            }
            Does::ReadUnlocked => {
                let unlocked = self.now.unlocked.expect("nothing was released before");
                ran(Ok(Some(unlocked.into())), session, 0, false);
            }
            Does::LeaveMark(mark) => {
                session.now.mark = *mark;
                ran(Ok(None), session, 0, false);
            }
            Does::ReleaseIfGranted(mark) => {
                if session.now.mark == *mark {
                    session.now.mark = 0;
                    session.release();
                }
                ran(Ok(None), session, 0, false);
            }
            Does::Reclaim => {
                if session.holds() {
                    session.release();
                    ran(Err(Says::Plain), session.clone(), 0, true);
                }
                ran(Ok(None), session, 0, false);
            }
            Does::HandOver => {
                assert!(self.holds > 0, "hands over what it does not hold");
                let handed_over = with(&|session| {
                    session.now.transaction_holds = true;
                    session.release();
                });
                ran(Err(Says::Plain), handed_over.clone(), 0, true);
                ran(Ok(None), handed_over, 0, false);
            }

            Does::IsHeld => ran(Ok(Some(self.holds().into())), session, 0, false),
            Does::Verify => {
                let failed = message.failed.as_ref().expect("asks about no statement");
                let is_known = self.knows_all || self.prepared.contains(failed);
                let unprepared = if is_known { 0 } else { 2 };
                let held = i64::from(self.holds());
                ran(Ok(Some(held + unprepared)), session, 0, false);
            }
            Does::PrepareTurn { rest, .. } => {
                let turn = (*rest).min(900);
                session.now.turn = turn;
                let millis = match self.surroundings.plpgsql {
                    true => i64::from(turn),
                    false => -i64::from(turn),
                };
                ran(Ok(Some(millis)), session, 0, false);
            }
            Does::Probe { passed } => {
                let timeout = i64::from(self.surroundings.statement_timeout);
                let number = if timeout > 0 && timeout <= *passed {
                    2
                } else {
                    1
                };
                ran(Err(Says::OutOfMemory), session.clone(), 0, true);
                ran(Ok(Some(number)), session, 0, false);
            }
            Does::ProbeInside => {
                ran(Err(Says::OutOfMemory), session.clone(), 0, true);
                ran(Ok(None), session, 0, false);
            }
            Does::Holders | Does::Version => ran(Ok(None), session, 0, false),
            Does::UnlockAll => {
                session.holds = 0;
                ran(Ok(None), session, 0, false);
            }
            Does::EndSession => ran(Err(Says::Lost), self.lost(), 0, false),
        }
        all
    }

    /// A statement is prepared before it is executed.
    fn prepare(&mut self, message: &Message) {
        if self.ended || self.surroundings.unnamed || self.knows_all {
            return;
        }
        if let Some(text) = &message.prepared {
            if !self.prepared.contains(text) {
                self.prepared.push(text.clone());
            }
        }
    }

    fn release(&mut self) {
        self.holds = self.holds.saturating_sub(1);
    }

    /// What the session may be when nobody reads the answer to the last message, which may also never have been sent.
    pub(crate) fn receive_unread(&self, last: &Message) -> Vec<Session> {
        let received = self.receive(last).into_iter().map(|reply| reply.session);
        std::iter::once(self.clone()).chain(received).collect()
    }

    /// A message is sent and nothing goes wrong.
    pub(crate) fn obey(&self, message: &Message) -> Vec<Session> {
        let replies = self.receive(message).into_iter();
        let usual = replies.filter(|reply| !reply.fault);
        usual.map(|reply| reply.session).collect()
    }

    /// A late cancel hits what is sent now, before it has done anything.
    pub(crate) fn cancelled(&self) -> Session {
        self.clone().aborted()
    }
}

/// What a server takes that does not wait.
pub(crate) const AT_ONCE: Duration = Duration::from_micros(100);
