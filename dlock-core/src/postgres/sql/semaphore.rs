//! Semaphores: the key of the gate is a number, and the slots are the numbers behind it.

use super::parts::has_own_locks;
use super::unread;
use crate::postgres::mark::Mark;
use crate::proto::{Bind, Columns, Prepared, Statement};

/// The answer of [`take_slot`]: no slot is free, or others wait for one.
pub(in crate::postgres) const NO_SLOT: i64 = -1;
/// The answer of [`take_slot`] on a standby, whose locks are its own. Nothing was asked for.
pub(in crate::postgres) const NO_SLOT_ON_STANDBY: i64 = -3;

/// Leaves in the session which slot this request was granted. The marks are left only together with the lock.
macro_rules! marked {
    ($mark:literal, $slot:literal) => {
        concat!(
            "pg_catalog.set_config('dlock.granted', ",
            $mark,
            "::pg_catalog.text, false) IS NOT NULL AND pg_catalog.set_config('dlock.slot', ",
            $slot,
            "::pg_catalog.text, false) IS NOT NULL"
        )
    };
}

/// Tries all slots, beginning anywhere, and takes the first that is free: the rows end there. The binds by their
/// names, and what the first slot to try depends on.
macro_rules! free_slot {
    ($column:literal, $gate:literal, $permits:literal, $first:literal, $marked:expr $(, but $except:literal)?) => {
        concat!(
            "SELECT ",
            $column,
            " FROM (SELECT pg_catalog.int8mod(i, ",
            $permits,
            ") AS slot FROM pg_catalog.generate_series(",
            $first,
            ", pg_catalog.int8pl(",
            $first,
            ", pg_catalog.int8mi(",
            $permits,
            ", 1))) i OFFSET 0) s WHERE CASE ",
            $("WHEN s.slot OPERATOR(pg_catalog.=) ANY (", $except, "::bigint[]) THEN false ",)?
            "WHEN pg_catalog.pg_try_advisory_lock(pg_catalog.int8pl(pg_catalog.int8pl(",
            $gate,
            ", 1), s.slot)) THEN ",
            $marked,
            " END LIMIT 1"
        )
    };
}

/// The rows of `pg_locks l` that are slots of a semaphore.
macro_rules! slots {
    ($gate:literal, $permits:literal) => {
        concat!(
            "pg_catalog.texteq(l.locktype, 'advisory') AND pg_catalog.int24eq(l.objsubid, 1) AND pg_catalog.int8le(",
            "pg_catalog.int8pl(",
            $gate,
            ", 1), pg_catalog.int8or(pg_catalog.int8shl(l.classid::bigint, 32), l.objid::bigint)) AND \
             pg_catalog.int8ge(pg_catalog.int8pl(",
            $gate,
            ", ",
            $permits,
            "), pg_catalog.int8or(pg_catalog.int8shl(l.classid::bigint, 32), l.objid::bigint))"
        )
    };
}

macro_rules! own {
    () => {
        " AND l.granted AND pg_catalog.int4eq(l.pid, pg_catalog.pg_backend_pid())"
    };
}

/// Takes a free slot without waiting: its number, [`NO_SLOT`] or [`NO_SLOT_ON_STANDBY`].
///
/// While others wait at the gate there is no free slot for a newcomer. To find out, it shares the gate for a moment,
/// which a waiting session does not let it. But a session that has a slot already gets that one once more, since the
/// others may be waiting for it.
///
/// With the mark 0 it releases the lock with this key: no row, which stands for 1, or 0. See `no_row_if!`. One text
/// does both, for the reasons of [`droppable`](super::droppable).
fn take_or_release(mark: i64, key: i64, permits: u32) -> Statement {
    const SQL: [&str; 4] = [
        concat!(
            "SELECT (CASE WHEN pg_catalog.int8eq($1, 0) THEN 0 WHEN ",
            has_own_locks!(),
            " THEN -3 WHEN NOT pg_catalog.pg_try_advisory_lock_shared($2) THEN coalesce((SELECT o.slot FROM (SELECT \
             pg_catalog.int8mi(pg_catalog.int8mi(pg_catalog.int8or(pg_catalog.int8shl(l.classid::bigint, 32), \
             l.objid::bigint), $2), 1) AS slot FROM pg_catalog.pg_locks l WHERE ",
            slots!("$2", "$3"),
            own!(),
            " LIMIT 1) o WHERE CASE WHEN pg_catalog.pg_try_advisory_lock(\
             pg_catalog.int8pl(pg_catalog.int8pl($2, 1), o.slot)) THEN ",
            marked!("$1", "o.slot"),
            " END), -1) WHEN pg_catalog.pg_advisory_unlock_shared($2) THEN coalesce((",
            free_slot!(
                "s.slot",
                "$2",
                "$3",
                "pg_catalog.pg_backend_pid()::bigint",
                marked!("$1", "s.slot")
            ),
            "), -1) END)::bigint WHERE NOT CASE WHEN pg_catalog.int8eq($1, 0) THEN pg_catalog.pg_advisory_unlock($2) \
             ELSE false END /* ",
        ),
        ", ",
        ", ",
        " */",
    ];
    let binds = [
        Bind::BigInt(mark),
        Bind::BigInt(key),
        Bind::BigInt(permits.into()),
    ];
    Statement::number(Prepared::PostgresSlot, &SQL, binds).columns(Columns::NoRow)
}

pub(in crate::postgres) fn take_slot(mark: Mark, gate: i64, permits: u32) -> Statement {
    take_or_release(mark.number(), gate, permits)
}

/// The same for a session that has these slots already, and wants another one. It goes behind the others who wait.
pub(in crate::postgres) fn take_another_slot(
    mark: Mark,
    gate: i64,
    permits: u32,
    except: &[u32],
) -> Statement {
    const SQL: [&str; 5] = [
        concat!(
            "SELECT (CASE WHEN pg_catalog.pg_is_in_recovery() THEN -3 \
             WHEN NOT pg_catalog.pg_try_advisory_lock_shared($2) THEN -1 \
             WHEN pg_catalog.pg_advisory_unlock_shared($2) THEN coalesce((",
            free_slot!(
                "s.slot",
                "$2",
                "$3",
                "pg_catalog.pg_backend_pid()::bigint",
                marked!("$1", "s.slot"),
                but "$4"
            ),
            "), -1) END)::bigint /* ",
        ),
        ", ",
        ", ",
        ", ",
        " */",
    ];
    let binds = [
        Bind::BigInt(mark.number()),
        Bind::BigInt(gate),
        Bind::BigInt(permits.into()),
        array(except),
    ];
    Statement::number(Prepared::ByText, &SQL, binds)
}

fn array(slots: &[u32]) -> Bind {
    let slots: Vec<_> = slots.iter().map(u32::to_string).collect();
    Bind::Text(format!("{{{}}}", slots.join(",")))
}

/// Releases a slot by its key: 1 or 0.
pub(in crate::postgres) fn release_slot(key: i64) -> Statement {
    take_or_release(0, key, 1)
}

/// Waits one turn for a slot, in a block of PL/pgSQL: first in the queue for the gate, then it looks for a free slot
/// again and again. The pauses are about a thirty-second of the time that it has looked, from 0.5 to 10 milliseconds.
///
/// The gate is the transaction's, so it is free when the message ends, however that ends. Going back to a savepoint
/// also frees it, and that is what the error is for: the next session need not wait for the end of the message. The
/// key of the gate and the length of the turn are where [`prepare_turn`](super::prepare_turn) has left them. If the
/// block is cancelled after a slot was granted, it gives that slot back.
///
/// The first look is at no slots, and before the gate: it has the query planned.
pub(in crate::postgres) fn turn_for_slot(mark: Mark, permits: u32) -> String {
    let mark = mark.number();
    format!(
        "SELECT pg_catalog.set_config('dlock.permits', '{permits}', true), \
         pg_catalog.set_config('dlock.mark', '{mark}', true), \
         pg_catalog.set_config('dlock.slot', '', false); {WAIT_FOR_SLOT}"
    )
}

const WAIT_FOR_SLOT: &str = concat!(
    "DO $dlock$ DECLARE \
     gate pg_catalog.int8 := pg_catalog.int8or(pg_catalog.int8shl(pg_catalog.current_setting('dlock.high')::bigint, \
     32), pg_catalog.current_setting('dlock.low')::bigint); \
     permits pg_catalog.int8 := 0; \
     ends pg_catalog.timestamptz := pg_catalog.timestamptz_pl_interval(pg_catalog.clock_timestamp(), \
     pg_catalog.textcat(pg_catalog.current_setting('dlock.millis'), 'ms')::interval); \
     detail pg_catalog.text; slot pg_catalog.int8; BEGIN \
     BEGIN PERFORM pg_catalog.set_config('client_connection_check_interval', '200ms', true); \
     EXCEPTION WHEN OTHERS THEN NULL; END; \
     BEGIN PERFORM pg_catalog.set_config('lock_timeout', pg_catalog.current_setting('dlock.millis'), true); \
     FOR n IN 0..2000000000 LOOP slot := (",
    free_slot!(
        "s.slot",
        "gate",
        "permits",
        "pg_catalog.int8pl(pg_catalog.pg_backend_pid()::bigint, n::bigint)",
        "true"
    ),
    "); IF slot IS NOT NULL THEN EXIT; END IF; \
     IF n OPERATOR(pg_catalog.=) 0 THEN PERFORM pg_catalog.pg_advisory_xact_lock(gate); \
     permits := pg_catalog.current_setting('dlock.permits')::bigint; CONTINUE; END IF; \
     EXIT WHEN pg_catalog.timestamptz_ge(pg_catalog.clock_timestamp(), ends); \
     PERFORM pg_catalog.pg_sleep(least(0.01::double precision, pg_catalog.float8mul(0.0005::double precision, \
     pg_catalog.dpow(1.03::double precision, n::double precision)))); END LOOP; \
     RAISE EXCEPTION USING ERRCODE = 'DL000'; \
     EXCEPTION WHEN lock_not_available OR SQLSTATE 'DL000' THEN NULL; \
     WHEN deadlock_detected THEN GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL; \
     IF pg_catalog.textregexne(detail, '[0-9]/[0-9]') THEN RAISE; END IF; END; \
     IF slot IS NOT NULL THEN \
     PERFORM pg_catalog.set_config('dlock.granted', pg_catalog.current_setting('dlock.mark'), false), \
     pg_catalog.set_config('dlock.slot', slot::pg_catalog.text, false); END IF; \
     EXCEPTION WHEN query_canceled THEN IF slot IS NOT NULL THEN \
     PERFORM pg_catalog.pg_advisory_unlock(pg_catalog.int8pl(pg_catalog.int8pl(gate, 1), slot)); END IF; RAISE; \
     END $dlock$"
);

/// What [`turn_for_slot`] was granted: 1 and the number of the slot, or 0.
pub(in crate::postgres) fn granted_slot() -> Statement {
    Statement::number(
        Prepared::ByText,
        &[
            "SELECT CASE WHEN pg_catalog.textne(pg_catalog.current_setting('dlock.slot', true), '') \
           THEN pg_catalog.int8pl(1, pg_catalog.current_setting('dlock.slot')::bigint) ELSE 0 END",
        ],
        [],
    )
}

/// Whether this session has a slot (1 or 0) besides these, after the prepared statement `failed` has failed: 2 more if
/// the session does not know that one. See [`verify`](super::verify).
pub(in crate::postgres) fn verify_slots(
    gate: i64,
    permits: u32,
    except: &[u32],
    failed: &str,
) -> Statement {
    const SQL: [&str; 5] = [
        concat!(
            "SELECT (EXISTS(SELECT FROM pg_catalog.pg_locks l WHERE ",
            slots!("$1", "$2"),
            own!(),
            " AND NOT pg_catalog.int8mi(pg_catalog.int8mi(pg_catalog.int8or(pg_catalog.int8shl(l.classid::bigint, \
             32), l.objid::bigint), $1), 1) OPERATOR(pg_catalog.=) ANY ($4::bigint[]))::int OPERATOR(pg_catalog.+) \
             CASE WHEN EXISTS(SELECT FROM pg_catalog.pg_prepared_statements p \
             WHERE pg_catalog.int4gt(pg_catalog.strpos(p.statement, $3), 0)) THEN 0 ELSE 2 END)::bigint /* "
        ),
        ", ",
        ", ",
        ", ",
        " */",
    ];
    let binds = [
        Bind::BigInt(gate),
        Bind::BigInt(permits.into()),
        Bind::Text(failed.to_owned()),
        array(except),
    ];
    Statement::number(Prepared::Never, &SQL, binds)
}

/// Who has a slot, and who waits for one. To hold the gate is to wait.
pub(in crate::postgres) fn slot_holders(gate: i64, permits: u32) -> Statement {
    const SQL: [&str; 3] = [
        concat!(
            "SELECT l.pid::bigint, a.application_name, pg_catalog.pg_get_userbyid(a.usesysid)::pg_catalog.text, \
             1::bigint, h.has_slot::int::bigint, pg_catalog.numeric_mul(extract(epoch FROM \
             coalesce(l.waitstart, a.xact_start, a.state_change)), 1000000)::bigint \
             FROM pg_catalog.pg_locks l CROSS JOIN LATERAL (SELECT l.granted AND pg_catalog.int8ne($1, \
             pg_catalog.int8or(pg_catalog.int8shl(l.classid::bigint, 32), l.objid::bigint)) AS has_slot) h \
             LEFT JOIN LATERAL pg_catalog.pg_stat_get_activity(l.pid) a ON true WHERE ",
            slots!("pg_catalog.int8mi($1, 1)", "pg_catalog.int8pl($2, 1)"),
            " AND pg_catalog.oideq(l.database, (SELECT d.oid FROM pg_catalog.pg_database d WHERE \
             pg_catalog.nameeq(d.datname, pg_catalog.current_database()))) \
             ORDER BY h.has_slot DESC, l.granted DESC, l.waitstart, l.pid /* "
        ),
        ", ",
        " */",
    ];
    let binds = [Bind::BigInt(gate), Bind::BigInt(permits.into())];
    Statement::number(Prepared::ByText, &SQL, binds).columns(Columns::Holders)
}

/// Releases the slot if the request with this mark was granted one, and only once.
pub(in crate::postgres) fn release_slot_if_granted(gate: i64, mark: Mark) -> String {
    unread(&format!(
        "SELECT WHERE NOT CASE WHEN pg_catalog.texteq(pg_catalog.current_setting('dlock.granted', true), '{mark}') \
         AND pg_catalog.set_config('dlock.granted', '', false) IS NOT NULL THEN \
         pg_catalog.pg_advisory_unlock(pg_catalog.int8pl(pg_catalog.int8pl('{gate}'::bigint, 1), \
         pg_catalog.current_setting('dlock.slot')::bigint)) IS NOT NULL ELSE true END"
    ))
}
